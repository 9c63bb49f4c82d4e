"""Merging: every weight equals what PEFT's own merge_and_unload gives in float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from quant.intake import source
from quant.lora import adapter as lora
from quant.lora.adapter import WEIGHTS
from quant.lora.merge import alone, change, delta, merged
from tests import tiny, variants

# PEFT multiplies and adds in the same float32, in another order of operations.
TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
MODULE = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with variants.one_thread():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("base"))


def merged_by_peft(base: Path, adapters: Sequence[Path]) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for folder in adapters:
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    weights: dict[str, Tensor] = model.state_dict()
    return weights


def assert_merges_as_peft(base: Path, *adapters: Path) -> None:
    theirs = merged_by_peft(base, adapters)
    opened = source.open(str(base), adapters=adapters)
    plain = source.open(str(base))
    moved = 0
    for name in opened.tensors.names():
        ours = opened.tensors.get(name)
        torch.testing.assert_close(ours.float(), theirs[name], **TOLERANCE)
        if opened.tensors.is_changed(name):
            assert ours.dtype == torch.float32
            moved += not torch.equal(ours, plain.tensors.get(name).float())
    assert moved == len({module for a in opened.adapters for module in a.pairs})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora_alpha": 3, "r": 5},
        {"use_rslora": True, "r": 9},
        {"rank_pattern": {"down_proj": 2, "layers.0.self_attn.q_proj": 7}},
        {"alpha_pattern": {"v_proj": 1, r"layers\.1\..*": 20}},
        {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 32}},
        {"targets": ("k_proj", "o_proj", "gate_proj", "up_proj")},
        {"layers_to_transform": [1]},
    ],
    ids=["plain", "alpha", "rslora", "ranks", "alphas", "all", "targets", "one-layer"],
)
def test_a_merge_is_pefts_merge(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    assert_merges_as_peft(base, tiny.adapter_folder(tmp_path / "lora", base, **settings))


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "phi3"])
def test_other_families_merge_as_peft_does(tmp_path: Path, family: str) -> None:
    base = tiny.model_folder(tmp_path / "base", family)
    targets = ("qkv_proj", "down_proj") if family == "phi3" else ("q_proj", "down_proj")
    assert_merges_as_peft(base, tiny.adapter_folder(tmp_path / "lora", base, targets=targets))


def test_a_head_merges_beside_pefts_copy_of_it(base: Path, tmp_path: Path) -> None:
    assert_merges_as_peft(
        base, tiny.adapter_folder(tmp_path / "lora", base, targets=("lm_head", "q_proj"))
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}},
        {"targets": ("embed_tokens", "q_proj"), "use_dora": True},
        {"modules_to_save": ["lm_head", "norm"]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora", "use_rslora": True},
    ],
    ids=["dora", "dora-patterns", "dora-embedding", "saved", "pissa", "olora"],
)
def test_what_is_more_than_a_pair_merges_as_peft_does(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    base = variants.base_folder(tmp_path / "base")
    folder, _ = variants.trained(tmp_path / "lora", base, **settings)
    theirs = merged_by_peft(base, [folder])
    opened = source.open(str(base), adapters=[folder])
    moved = {name for name in opened.tensors.names() if opened.tensors.is_changed(name)}
    assert moved == opened.adapters[0].parts.tensors()
    for name in moved:
        torch.testing.assert_close(opened.tensors.get(name), theirs[name], rtol=1e-4, atol=1e-5)


def test_two_adapters_add_up(base: Path, tmp_path: Path) -> None:
    first = tiny.adapter_folder(tmp_path / "first", base)
    second = tiny.adapter_folder(
        tmp_path / "second", base, targets=("q_proj", "up_proj"), r=2, use_rslora=True, seed=1
    )
    assert_merges_as_peft(base, first, second)


def test_weights_stored_in_by_out_are_merged_transposed(tmp_path: Path) -> None:
    config = CONFIG_MAPPING["gpt2"](
        vocab_size=tiny.VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=128
    )
    torch.manual_seed(0)
    tiny.tokenizer(tmp_path / "base")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    folder = tiny.adapter_folder(
        tmp_path / "lora", tmp_path / "base", targets=("c_attn", "c_fc"), fan_in_fan_out=True
    )
    assert lora.read(folder).config.fan_in_fan_out
    assert_merges_as_peft(tmp_path / "base", folder)


def test_a_half_precision_adapter_is_multiplied_in_float32(base: Path, tmp_path: Path) -> None:
    folder = tiny.adapter_folder(tmp_path / "lora", base)
    halves = {name: t.to(torch.bfloat16) for name, t in load_file(folder / WEIGHTS).items()}
    save_file(halves, folder / WEIGHTS)
    assert_merges_as_peft(base, folder)


def test_the_base_is_not_changed_in_place(base: Path, tmp_path: Path) -> None:
    adapter = lora.read(tiny.adapter_folder(tmp_path / "lora", base))
    weight = torch.zeros(64, 128)
    after = merged(weight, [adapter], f"{MODULE}.weight")
    assert not weight.any()
    torch.testing.assert_close(after, delta(adapter, MODULE))
    assert after.any()


def test_a_tensor_that_no_adapter_holds_stays_as_it_was(base: Path, tmp_path: Path) -> None:
    adapter = lora.read(tiny.adapter_folder(tmp_path / "lora", base))
    weight = torch.randn(4, 4).to(torch.bfloat16)
    assert torch.equal(merged(weight, [adapter], "model.norm.weight"), weight.float())
    assert not change(adapter, weight, "model.norm.weight").any()


def test_changes_of_every_kind_add_up(tmp_path: Path) -> None:
    """Two adapters' sum is the base and each one's own change, DoRA's taken against the base."""
    base = variants.base_folder(tmp_path / "base")
    dora = lora.read_trained(variants.trained(tmp_path / "dora", base, use_dora=True)[0])
    plain = lora.read_trained(variants.trained(tmp_path / "plain", base, seed=1)[0])
    name = f"{MODULE}.weight"
    weight = source.open(str(base)).tensors.get(name)
    both = merged(weight, [dora, plain], name)
    torch.testing.assert_close(
        both, alone(dora, weight, name) + delta(plain, MODULE), rtol=1e-5, atol=1e-6
    )
