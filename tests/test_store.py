"""Taking adapters in: what is refused, with which field, and that the copy is our own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve.errors import AdapterRefused
from serve.store import Base, take_in
from tests.lora import write_lora

MODULE = "model.layers.0.mlp.up_proj"
BASE = Base({MODULE: (8, 6)}, max_rank=4, weights="a" * 64)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "lora", {MODULE: (8, 6)})


def test_the_copy_does_not_follow_the_source(lora: Path, tmp_path: Path) -> None:
    first = take_in(lora, BASE, tmp_path / "store")
    before = (first.folder / "adapter_model.safetensors").read_bytes()
    write_lora(lora, {MODULE: (8, 6)}, seed=9)
    second = take_in(lora, BASE, tmp_path / "store")
    assert (first.folder / "adapter_model.safetensors").read_bytes() == before
    assert second.digest != first.digest


def test_only_the_two_files_the_engine_needs_are_taken(lora: Path, tmp_path: Path) -> None:
    (lora / "optimizer.pt").write_bytes(b"x" * 1000)
    stored = take_in(lora, BASE, tmp_path / "store")
    names = {path.name for path in stored.folder.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}


def test_nothing_is_left_of_a_refused_adapter(lora: Path, tmp_path: Path) -> None:
    tensors = load_file(lora / "adapter_model.safetensors")
    name = f"base_model.model.{MODULE}.lora_A.weight"
    tensors[name][0, 0] = torch.nan
    save_file(tensors, lora / "adapter_model.safetensors")
    with pytest.raises(AdapterRefused, match="NaN") as refusal:
        take_in(lora, BASE, tmp_path / "store")
    assert refusal.value.param == name
    assert not (tmp_path / "store").exists()


def test_a_rank_above_the_limit_is_named(tmp_path: Path) -> None:
    wide = write_lora(tmp_path / "wide", {MODULE: (8, 6)}, rank=5)
    with pytest.raises(AdapterRefused, match="at most 4") as refusal:
        take_in(wide, BASE, tmp_path / "store")
    assert refusal.value.param == "rank"


def test_lineage_decides_by_fingerprint(lora: Path, tmp_path: Path) -> None:
    base = {"weights": "b" * 64, "tokenizer": "c" * 64}
    (lora / "quantserve-adapter.json").write_text(json.dumps({"format": 1, "base": base}))
    with pytest.raises(AdapterRefused, match="bbbbbbbbbbbb"):
        take_in(lora, BASE, tmp_path / "store")


def test_a_pickle_is_refused(lora: Path, tmp_path: Path) -> None:
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
    with pytest.raises(AdapterRefused, match="pickle"):
        take_in(lora, BASE, tmp_path / "store")


def test_a_relative_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterRefused, match="not absolute"):
        take_in(Path("lora"), BASE, tmp_path / "store")
