"""`bench.memory`: models of a shape, and what a process took."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from bench import memory
from quant.intake import source
from quant.solver import devices
from tests import tiny

SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.tokenizer(tmp_path / "tokenizer")
    memory.make(tmp_path / "model", SHAPE, tmp_path / "tokenizer")
    return tmp_path / "model"


def test_a_made_model_is_one_that_can_be_quantized(folder: Path, tmp_path: Path) -> None:
    opened = source.open(str(folder), cache=tmp_path)
    assert opened.dtype == torch.bfloat16 and "lm_head.weight" not in opened.tensors
    weight = opened.tensors.get("model.layers.1.mlp.down_proj.weight").float()
    assert float(weight.std()) == pytest.approx(memory.SPREAD, rel=0.1)
    assert bool((opened.tensors.get("model.norm.weight") == 1).all())


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_the_floor_is_a_block_a_hessian_and_the_states(
    dtype: torch.dtype, size: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block and states as this processor computes them."""
    monkeypatch.setattr(devices, "forward_dtype", lambda _device, **_: dtype)
    block = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128
    expected = {"block": size * block, "Hessian": 4 * 128**2, "states": 2 * size * 8 * 32 * 64}
    assert memory.floor(folder, samples=8, length=32) == expected


def test_a_process_is_watched_to_its_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = "import time; held = b'1' * (200 << 20); print(len(held)); time.sleep(1)"
    cost = memory.watched([sys.executable, "-c", code], log)
    assert 200 << 20 <= cost.peak < 300 << 20 and cost.seconds > 0
    assert log.read_text() == f"{200 << 20}\n"
    with pytest.raises(SystemExit, match=str(log)):
        memory.watched([sys.executable, "-c", "raise SystemExit(3)"], log)


def test_lines_of_letters_hold_the_tokens_asked_for(tmp_path: Path) -> None:
    memory.letters(tmp_path / "texts.jsonl", 640)
    lines = (tmp_path / "texts.jsonl").read_text().splitlines()
    assert len(lines) == 10 and all(len(json.loads(line)["text"]) == 400 for line in lines)
