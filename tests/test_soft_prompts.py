"""Prompts behind virtual tokens, as vLLM takes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from vllm.sampling_params import SamplingParams

from serve.adapters.pool import Version
from serve.adapters.store import Stored
from serve.errors import BadRequest
from serve.soft_prompts import SoftPrompts
from tests.soft import write_soft

ROWS = torch.arange(6, dtype=torch.float32).reshape(3, 2)


def refuse_large(ids: object) -> None:
    assert isinstance(ids, list)
    if max(ids) > 99:
        raise ValueError("out of vocabulary")


@pytest.fixture
def version(tmp_path: Path) -> Version:
    folder = write_soft(tmp_path / "soft", ROWS)
    return Version("legal", Stored("d" * 64, folder, 0, 0, virtual_tokens=3), 1, 0.0)


@pytest.fixture
async def soft(version: Version) -> SoftPrompts:
    made = SoftPrompts(torch.bfloat16, 20, refuse_large)
    await made.load(version)
    return made


def tokens(*ids: int, **more: object) -> dict[str, object]:
    return {"type": "token", "prompt_token_ids": list(ids), **more}


async def test_rows_stand_in_front_and_ids_stay_ids(soft: SoftPrompts, version: Version) -> None:
    asked = tokens(7, 8, prompt="text", cache_salt="tenant", arrival_time=1.0)
    made = soft.prepend(version, asked, SamplingParams())
    assert made["prompt_embeds"].dtype == torch.bfloat16
    assert torch.equal(made["prompt_embeds"].float(), torch.cat([ROWS, torch.zeros(2, 2)]))
    assert made["is_token_ids"] == [False] * 3 + [True] * 2
    assert made["prompt_token_ids"][3:] == [7, 8]
    assert set(made["prompt_token_ids"]) == {7, 8}, "penalties see no id that was not sent"
    assert (made["type"], made["prompt"], made["cache_salt"]) == ("embeds", "text", "tenant")


async def test_answers_end_where_the_context_does(soft: SoftPrompts, version: Version) -> None:
    params = SamplingParams(max_tokens=100)
    soft.prepend(version, tokens(*range(10)), params)
    assert params.max_tokens == 20 - 3 - 10
    short = SamplingParams(max_tokens=2)
    soft.prepend(version, tokens(1), short)
    assert short.max_tokens == 2


async def test_what_cannot_be_is_refused(soft: SoftPrompts, version: Version) -> None:
    with pytest.raises(ValueError, match="out of vocabulary"):
        soft.prepend(version, tokens(5, 100), SamplingParams())
    with pytest.raises(BadRequest, match="text only"):
        soft.prepend(version, {"type": "multimodal", "prompt_token_ids": [1]}, SamplingParams())
    with pytest.raises(BadRequest, match="virtual tokens") as refusal:
        soft.prepend(version, tokens(1), SamplingParams(prompt_logprobs=1))
    assert refusal.value.param == "prompt_logprobs"


async def test_unloaded_rows_are_gone(soft: SoftPrompts, version: Version) -> None:
    soft.unload(version)
    with pytest.raises(KeyError):
        soft.prepend(version, tokens(1), SamplingParams())
    soft.unload(version)
