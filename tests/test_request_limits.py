"""The table of limits, held against the fields of vLLM's own request models."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import (
    BatchChatCompletionRequest,
    ChatCompletionRequest,
)
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest

from serve.errors import BadRequest
from serve.request_limits import RequestLimits, check, limits_of
from serve.settings import Settings

LIMITS = RequestLimits()
HI = {"role": "user", "content": "hi"}
DEEP = "[" * 100_000
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": DEEP}
CALLED = {
    "role": "assistant",
    "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": DEEP}}],
}


def chat(**given: Any) -> Any:
    return ChatCompletionRequest(**{"model": "m", "messages": [HI], **given})


def completion(**given: Any) -> Any:
    return CompletionRequest(**{"model": "m", "prompt": "hi", **given})


@pytest.mark.parametrize(
    ("request_", "param", "said"),
    [
        (chat(model="m" * 2_200_000), "model", "at most 265"),
        (chat(user="u" * 1000), "user", "at most 512"),
        (chat(request_id="u" * 1000), "request_id", "at most 512"),
        (chat(messages=[HI] * 5000), "messages", "at most 4096 (QUANTSERVE_MAX_MESSAGES)"),
        (TokenizeChatRequest(model="m", messages=[HI] * 5000), "messages", "at most 4096"),
        (BatchChatCompletionRequest(model="m", messages=[[HI] * 5000]), "messages", "at most 4096"),
        (BatchChatCompletionRequest(model="m", messages=[[HI]] * 3000), "messages", "2048"),
        (ResponsesRequest(model="m", input=[HI] * 5000), "input", "at most 4096"),
        (chat(chat_template_kwargs={"conversation": 1}), "chat_template_kwargs", "another name"),
        (chat(messages=[CALLED]), "messages", "nested deeper than 64"),
        (BatchChatCompletionRequest(model="m", messages=[[HI, CALLED]]), "messages", "deeper"),
        (ResponsesRequest(model="m", input=[CALL]), "input", "nested deeper than 64"),
        (chat(n=16384), "n", "at most 128 (QUANTSERVE_MAX_N)"),
        (chat(n=17, use_beam_search=True), "n", "at most 16"),
        (completion(n=128, prompt=["a"] * 17), "prompt", "2176 sequences"),
        (completion(prompt=[[1]] * 1000, n=3), "prompt", "3000 sequences"),
        ({"stop": ["s"] * 65}, "stop", "65 entries; at most 64"),
        (chat(stop="s" * 2000), "stop", "more than 1024 characters"),
        (chat(bad_words=["s"] * 300), "bad_words", "at most 256"),
        (chat(stop_token_ids=[1] * 2000), "stop_token_ids", "at most 1024"),
        (chat(logit_bias={str(i): 1.0 for i in range(2000)}), "logit_bias", "at most 1024"),
        (chat(allowed_token_ids=[1] * 70_000), "allowed_token_ids", "at most 65536"),
        (chat(tools=[{"type": "function", "function": {"name": "f"}}] * 300), "tools", "256"),
        (chat(top_k=10**20), "top_k", "out of range"),
        (chat(top_k=2**31), "top_k", "out of range"),
        (completion(min_tokens=-(10**20)), "min_tokens", "out of range"),
        (completion(temperature=1e308), "temperature", "out of range"),
        (completion(repetition_penalty=float("inf")), "repetition_penalty", "out of range"),
    ],
)  # fmt: skip
def test_each_limit_names_its_field_and_its_number(request_: Any, param: str, said: str) -> None:
    with pytest.raises(BadRequest) as caught:
        check(request_ if isinstance(request_, dict) else vars(request_), LIMITS)
    assert caught.value.param == param and said in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "request_",
    [
        chat(model=None),
        chat(
            n=128,
            stop=["a", "b", "c", "d"],
            seed=2**62,
            top_k=-1,
            top_p=0.5,
            logit_bias={"5": -100.0},
        ),
        chat(messages=[HI] * 1000, max_tokens=100_000),
        completion(prompt=list(range(100_000))),
        completion(prompt=["a"] * 1024, n=2),
        completion(prompt=[[1, 2]] * 100, n=2),
        ResponsesRequest(model="m", input="hi"),
        ResponsesRequest(model="m", input=[HI] * 3),
        BatchChatCompletionRequest(model="m", messages=[[HI]] * 100),
    ],
)
def test_what_people_send_passes(request_: Any) -> None:
    check(request_ if isinstance(request_, dict) else vars(request_), LIMITS)


def test_every_limit_is_above_nothing_and_the_settings_reach_theirs() -> None:
    assert all(getattr(LIMITS, field.name) > 0 for field in fields(LIMITS))
    chosen = limits_of(Settings(max_messages=1, max_n=2, max_sequences=3))
    assert (chosen.messages, chosen.n, chosen.sequences) == (1, 2, 3)
