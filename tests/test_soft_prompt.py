"""Prompt-tuned folders: what PEFT saves is read, what cannot be served is refused with reasons."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant.errors import AdapterError
from quant.lora import adapter, soft_prompt, suitability
from serve.adapters.sources import Sources
from serve.adapters.store import Base, Store
from serve.errors import AdapterRefused
from tests import tiny
from tests.soft import KINDS, trained_soft, write_soft


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("base") / "tiny", layers=1)


@pytest.fixture
def soft(tmp_path: Path) -> Path:
    return write_soft(tmp_path / "soft", torch.randn(5, 64))


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_saves_is_read(tmp_path: Path, base: Path, kind: str) -> None:
    folder = trained_soft(tmp_path / "soft", base, kind, tokens=6)
    found = soft_prompt.read(folder)
    assert (found.kind, found.tokens, found.width) == (kind, 6, 64)
    assert soft_prompt.is_one(folder) and found.base_named == str(base)
    soft_prompt.validate(found, 64, None)
    with pytest.raises(AdapterError, match="expected 128, found 64"):
        soft_prompt.validate(found, 128, None)


def test_the_digest_is_over_rows_and_voice(soft: Path) -> None:
    digests = {soft_prompt.read(soft).digest}
    (soft / "generation_config.json").write_text('{"temperature": 0.5}')
    digests.add(soft_prompt.read(soft).digest)
    write_soft(soft, torch.randn(5, 64))
    digests.add(soft_prompt.read(soft).digest)
    assert len(digests) == 3


def spoil(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def spoiled(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return spoiled


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: tiny.edit_json(folder / "adapter_config.json", **changes)


@pytest.mark.parametrize(
    ("damage", "field"),
    [
        (spoil(lambda held: held.update(extra=torch.zeros(2))), "prompt_embeddings"),
        (spoil(lambda held: held.update(prompt_embeddings=torch.zeros(5))), "prompt_embeddings"),
        (
            spoil(lambda held: held.update(prompt_embeddings=torch.zeros(5, 64).long())),
            "prompt_embeddings",
        ),
        (
            spoil(lambda held: held.update(prompt_embeddings=torch.full((5, 64), torch.nan))),
            "prompt_embeddings",
        ),
        (config(num_virtual_tokens=4), "num_virtual_tokens"),
        (config(num_virtual_tokens=0), "num_virtual_tokens"),
        (config(num_virtual_tokens=10**9), "num_virtual_tokens"),
        (config(num_virtual_tokens=None), "num_virtual_tokens"),
        (config(peft_type="PREFIX_TUNING"), "peft_type"),
    ],
)
def test_damage_is_named_and_nothing_is_kept(
    soft: Path, tmp_path: Path, damage: Callable[[Path], None], field: str
) -> None:
    damage(soft)
    with pytest.raises(AdapterError) as refusal:
        soft_prompt.read(soft)
    assert refusal.value.field == field
    store = Store(tmp_path / "store", Base({}, 8, None, width=64), Sources())
    with pytest.raises(AdapterRefused):
        store.take_in(str(soft))
    assert list(store.root.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "way_out"),
    [
        ("PREFIX_TUNING", "train prompt tuning, p-tuning or a LoRA"),
        ("CARTRIDGE", "every layer's cache"),
        ("MULTITASK_PROMPT_TUNING", "task"),
        ("ADAPTION_PROMPT", "train a LoRA"),
        ("IA3", "merge_and_unload"),
        ("LOHA", "merge_and_unload"),
        (["LORA"], "merge_and_unload"),
        (None, "merge_and_unload"),
    ],
)
def test_other_kinds_are_refused_with_the_reason_and_a_way_out(
    soft: Path, kind: object, way_out: str
) -> None:
    tiny.edit_json(soft / "adapter_config.json", peft_type=kind)
    assert not soft_prompt.is_one(soft)
    with pytest.raises(AdapterError, match=way_out) as refusal:
        adapter.read(soft)
    assert refusal.value.field == "peft_type"


def test_a_soft_prompt_cannot_be_merged_and_says_what_works(soft: Path) -> None:
    with pytest.raises(AdapterError, match="served as they are"):
        adapter.read_trained(soft)


def test_it_is_taken_in_for_a_base_of_its_width(soft: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store", Base({}, 8, "a" * 64, width=64), Sources())
    stored = store.take_in(str(soft))
    assert (stored.rank, stored.virtual_tokens) == (0, 5)
    assert store.find(stored.digest) == stored
    for other in (Base({}, 8, None, width=32), Base({}, 8, None)):
        with pytest.raises(AdapterRefused, match="width"):
            Store(store.root, other, Sources()).find(stored.digest)
    lineage = {"format": 1, "base": {"weights": "b" * 64}}
    (soft / "quantserve-adapter.json").write_text(json.dumps(lineage))
    with pytest.raises(AdapterRefused, match="base weights"):
        store.take_in(str(soft))


def test_check_says_which_path_is_open(soft: Path, base: Path) -> None:
    found = suitability.judge(soft, base)
    assert found.variant == ("prompt-tuning, 5 virtual tokens",)
    assert found.swap.works and not found.merge.works
    write_soft(soft, torch.randn(5, 32))
    misfit = suitability.judge(soft, base)
    assert not misfit.usable and "width" in misfit.swap.reason
