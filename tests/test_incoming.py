"""What the plugin makes of vLLM's parsed requests before their model is looked up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.exceptions import GenerationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from serve import vllm_compat
from serve.errors import BadRequest
from serve.incoming import placing, watching
from serve.request_limits import RequestLimits
from serve.serving import Serving
from serve.turn import Turn, current

SCHEMA = {"type": "object"}
HI = [{"role": "user", "content": "hi"}]
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
TEXT = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}


class Trial:
    """Refuses what it is told to, and keeps what it was shown."""

    def __init__(self) -> None:
        self.shown: list[Any] = []
        self.refuses = False

    async def check(self, wanted: Any) -> None:
        self.shown.append(wanted.json or wanted.regex)
        if self.refuses:
            raise BadRequest("it never ends", param="regex")


@pytest.fixture
def trial() -> Trial:
    return Trial()


@pytest.fixture
def turn() -> Iterator[Turn]:
    made = Turn()
    current.set(made)
    yield made
    current.set(None)


@pytest.mark.parametrize(
    ("request_", "shown"),
    [
        (ChatCompletionRequest(messages=HI, response_format=FORM), [SCHEMA]),
        (ChatCompletionRequest(messages=HI, structured_outputs={"regex": "a"}), ["a"]),
        (CompletionRequest(prompt="hi", response_format=FORM), [SCHEMA]),
        (CompletionRequest(prompt="hi", structured_outputs={"regex": "a"}), ["a"]),
        (ResponsesRequest(input="hi", text=TEXT), [SCHEMA]),
        (ChatCompletionRequest(messages=HI), []),
        (SimpleNamespace(model="m"), []),
    ],
)
async def test_every_apis_grammar_is_tried(request_: Any, shown: list[Any], trial: Trial) -> None:
    await watching(RequestLimits(), trial)(request_)  # type: ignore[arg-type]
    assert trial.shown == shown


async def test_what_is_refused_is_the_requests_fault_whoever_catches_it(
    trial: Trial, turn: Turn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of vLLM's handlers make a 500 of any exception; the answer knows better."""
    monkeypatch.setattr(BaseServing, "_check_model", BaseServing.__dict__["_check_model"])
    vllm_compat._watch(BaseServing, watching(RequestLimits(), trial))  # type: ignore[arg-type]
    asked = CompletionRequest(prompt="hi", n=16384)
    with pytest.raises(BadRequest, match="at most 128") as caught:
        await BaseServing._check_model(SimpleNamespace(), asked)
    assert turn.fault is caught.value


async def test_a_grammar_that_only_the_engine_would_see_is_tried_there(
    trial: Trial, turn: Turn, serving: Serving
) -> None:
    """That of a request's tools, which vLLM makes after everything has been checked."""
    started = asyncio.Event()

    async def stock(*_: Any) -> AsyncGenerator[str, None]:
        started.set()
        yield "answer"

    serving.trial = trial  # type: ignore[assignment]
    generate = placing(stock, serving, None)
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"))
    assert [one async for one in generate("", params, "1")] == ["answer"]
    assert trial.shown == ["a"]
    started.clear()
    trial.refuses = True
    with pytest.raises(GenerationError, match="never ends"):
        await anext(generate("", params, "2"))
    assert isinstance(turn.fault, BadRequest) and not started.is_set()
    serving.trial = None
