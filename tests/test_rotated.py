"""`bench.rotated`: the same function from other weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench import rotated
from bench.rotated import Turn
from quant.intake import source
from quant.intake.source import Source
from tests import tiny

IDS = torch.arange(4, 84)[None]


def opened(folder: Path) -> Source:
    return source.open(str(folder), cache=folder.parent / "cache")


def write(
    parent: Path,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    wider: dict[str, int] | None = None,
) -> None:
    own = opened(parent)
    turn = Turn.of(own.config.get_text_config(), 0, **(wider or {}))
    rotated.write(own, folder, turn=turn, dtype=dtype)


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize("head", ["tied", "own"])
def test_logits_stay_and_weights_turn(head: str, tmp_path: Path) -> None:
    folder = tiny.model_folder(tmp_path / "parent", dtype=torch.float32, tied=head == "tied")
    made = tmp_path / "rotated"
    write(folder, made)
    before, after = opened(folder), opened(made)
    torch.testing.assert_close(logits(made), logits(folder), rtol=1e-4, atol=1e-4)
    for name in before.tensors.names():
        was, now = before.tensors.get(name), after.tensors.get(name)
        if was.dim() == 1:
            assert torch.equal(now, torch.ones_like(was)), name
        else:
            assert (now - was).abs().mean() > 0.3 * was.abs().mean(), name
    assert "lm_head.weight" in after.tensors


@pytest.mark.parametrize("wider", [{"width": 80}, {"kv": 4}, {"width": 96, "kv": 3}], ids=str)
def test_a_wider_model_is_the_same_function(wider: dict[str, int], tmp_path: Path) -> None:
    folder = tiny.model_folder(tmp_path / "parent", dtype=torch.float32)
    write(folder, tmp_path / "wider", wider=wider)
    torch.testing.assert_close(logits(tmp_path / "wider"), logits(folder), rtol=1e-4, atol=1e-4)
    config = opened(tmp_path / "wider").config.get_text_config()
    assert config.hidden_size == wider.get("width", 64)
    assert config.num_key_value_heads == wider.get("kv", 2)


def test_a_stream_cannot_lose_width(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="64 wide with 2 heads"):
        write(tiny.model_folder(tmp_path / "parent"), tmp_path / "narrow", wider={"width": 32})


def test_the_tokenizer_travels_along(tmp_path: Path) -> None:
    folder = tiny.model_folder(tmp_path / "parent")
    write(folder, tmp_path / "rotated", dtype=torch.bfloat16)
    own = opened(tmp_path / "rotated")
    assert own.fingerprint.tokenizer == opened(folder).fingerprint.tokenizer
    assert own.dtype == torch.bfloat16


def test_another_seed_is_another_rotation(tmp_path: Path) -> None:
    parent = opened(tiny.model_folder(tmp_path / "parent"))
    turns = [Turn.of(parent.config.get_text_config(), seed) for seed in (0, 1, 0)]
    one, other, again = (rotated.turned(parent, turn) for turn in turns)
    name = "model.layers.1.mlp.down_proj.weight"
    assert not torch.allclose(one[name], other[name], atol=1e-3)
    assert torch.equal(one[name], again[name])


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    tiny.model_folder(tmp_path / "parent", "phi3")
    with pytest.raises(SystemExit, match="Phi3ForCausalLM"):
        write(tmp_path / "parent", tmp_path / "rotated")
    assert not (tmp_path / "rotated").exists()
