"""`bench.rotated`: the same function from other weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench import rotated
from quant.intake import source
from quant.intake.source import Source
from tests import tiny

IDS = torch.arange(4, 84)[None]


def opened(folder: Path) -> Source:
    return source.open(str(folder), cache=folder.parent / "cache")


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize("head", ["tied", "own"])
def test_logits_stay_and_weights_turn(head: str, tmp_path: Path) -> None:
    folder = tiny.model_folder(tmp_path / "parent", dtype=torch.float32, tied=head == "tied")
    made = tmp_path / "rotated"
    rotated.write(opened(folder), made, seed=0, dtype=torch.float32)
    before, after = opened(folder), opened(made)
    torch.testing.assert_close(logits(made), logits(folder), rtol=1e-4, atol=1e-4)
    for name in before.tensors.names():
        was, now = before.tensors.get(name), after.tensors.get(name)
        if was.dim() == 1:
            assert torch.equal(now, torch.ones_like(was)), name
        else:
            assert (now - was).abs().mean() > 0.3 * was.abs().mean(), name
    assert "lm_head.weight" in after.tensors


def test_the_tokenizer_travels_along(tmp_path: Path) -> None:
    folder = tiny.model_folder(tmp_path / "parent")
    rotated.write(opened(folder), tmp_path / "rotated", seed=0, dtype=torch.bfloat16)
    own = opened(tmp_path / "rotated")
    assert own.fingerprint.tokenizer == opened(folder).fingerprint.tokenizer
    assert own.dtype == torch.bfloat16


def test_another_seed_is_another_rotation(tmp_path: Path) -> None:
    parent = opened(tiny.model_folder(tmp_path / "parent"))
    one, other = rotated.turned(parent, 0), rotated.turned(parent, 1)
    name = "model.layers.1.mlp.down_proj.weight"
    assert not torch.allclose(one[name], other[name], atol=1e-3)
    assert torch.equal(one[name], rotated.turned(parent, 0)[name])


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    parent = opened(tiny.model_folder(tmp_path / "parent", "phi3"))
    with pytest.raises(SystemExit, match="Phi3ForCausalLM"):
        rotated.write(parent, tmp_path / "rotated", seed=0, dtype=torch.float32)
    assert not (tmp_path / "rotated").exists()
