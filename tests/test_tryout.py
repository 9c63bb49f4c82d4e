"""A version tried before it is published: what would fail every request, or end the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import EngineCoreRequest

from quant.lora.voice import Voice
from serve.adapters.pool import Version
from serve.adapters.store import Stored
from serve.errors import AdapterRefused
from serve.tryout import Tryout
from serve.turn import current

Chat = Callable[[Any], Any]


def rendered(_: Any) -> tuple[list[Any], list[dict[str, Any]]]:
    return [], [{"type": "token", "prompt_token_ids": [1, 2]}]


def tryout(chat: Chat = rendered, *, room: int = 64, tasks: tuple[str, ...] = ("generate",)) -> Any:
    """vLLM's client and renderer as far as they are asked; its parameters and packing are real."""

    def process(request_id: str, prompt: Any, params: Any, tasks: Any) -> EngineCoreRequest:
        return EngineCoreRequest(
            request_id, prompt["prompt_token_ids"], None, params.clone(), None, 0.0, None, None,
            None,
        )  # fmt: skip

    async def supported() -> tuple[str, ...]:
        return tasks

    async def render_chat(request: Any) -> Any:
        turn = current.get()
        assert turn is not None and turn.version is not None, "asked as no request would"
        return chat(request)

    config = SimpleNamespace(get_diff_sampling_param=dict, max_model_len=room)
    client = SimpleNamespace(
        model_config=config,
        input_processor=SimpleNamespace(process_inputs=process),
        get_supported_tasks=supported,
    )
    return Tryout(client, SimpleNamespace(render_chat=render_chat))


def version(tokens: int = 0, **own: Any) -> Version:
    return Version("legal", Stored("d" * 64, Path(), 4, 0, Voice(**own), tokens), 1, 0.0)


TEMPLATES = {"default": "{{ messages[0].content }}"}
SANE = {"temperature": 0.5, "top_k": 20, "max_tokens": 7, "repetition_penalty": 1.1}


async def test_what_can_be_served_passes_and_leaves_no_turn_behind() -> None:
    own = version(templates=TEMPLATES, defaults=SANE, stop=("END",), eos=(2, 3))
    await tryout().of(own)
    await tryout().of(version())
    assert current.get() is None


@pytest.mark.parametrize(
    "own",
    [
        {"stop": ("",)},
        {"stop": ("ok", "")},
        {"stop": ("\ud800",)},
        {"eos": (10**30,)},
        {"defaults": {"top_k": 10**20}},
        {"defaults": {"top_p": 7.0}},
        {"defaults": {"presence_penalty": 3.0}},
        {"defaults": {"max_tokens": 0}},
    ],
    ids=str,
)
async def test_what_the_engine_would_end_of_is_refused(own: dict[str, Any]) -> None:
    """Straight to the tryout, as if no bound had been put on it where it was read."""
    with pytest.raises(AdapterRefused, match="would fail every request") as refusal:
        await tryout().of(version(**own))
    assert refusal.value.status == 422


async def test_a_template_is_refused_when_every_chat_fails() -> None:
    def fails(_: Any) -> Any:
        raise VLLMValidationError("the adapter's chat template: no")

    def answers(_: Any) -> Any:
        return SimpleNamespace(error=SimpleNamespace(message="not here"))

    def wants_a_system_message(request: Any) -> Any:
        return rendered(request) if len(request.messages) > 1 else fails(request)

    speaking = version(templates=TEMPLATES)
    with pytest.raises(AdapterRefused, match="writes no chat: the adapter's chat template: no"):
        await tryout(fails).of(speaking)
    with pytest.raises(AdapterRefused, match="writes no chat: not here"):
        await tryout(answers).of(speaking)
    await tryout(wants_a_system_message).of(speaking)
    await tryout(fails).of(version())  # the base's template is not the adapter's


@pytest.mark.parametrize("ids", [[], [1] * 64])
async def test_a_chat_without_tokens_or_room_is_refused(ids: list[int]) -> None:
    def of_length(_: Any) -> Any:
        return [], [{"type": "token", "prompt_token_ids": ids}]

    with pytest.raises(AdapterRefused, match=f"is {len(ids)} tokens long"):
        await tryout(of_length).of(version(templates=TEMPLATES))


async def test_virtual_tokens_that_fill_the_context_are_refused() -> None:
    await tryout(room=10).of(version(tokens=8))
    with pytest.raises(AdapterRefused, match="room for 1") as refusal:
        await tryout(room=10).of(version(tokens=9))
    assert refusal.value.param == "num_virtual_tokens"


async def test_a_model_that_generates_nothing_needs_no_sampling() -> None:
    await tryout(tasks=("embed",)).of(version(stop=("",)))
