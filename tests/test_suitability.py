"""Which paths are open to an adapter: every variant, without a base and against one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant import artifact
from quant.errors import ArtifactError, SourceError
from quant.lora import suitability
from quant.lora.adapter import CONFIG, LINEAGE
from tests import tiny, variants
from tests.lora import write_lora

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with variants.one_thread():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return variants.base_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "legal", {UP: (128, 64)})


@pytest.fixture
def quantized(base: Path, tmp_path: Path) -> Path:
    """A folder that another tool has quantized."""
    folder = Path(shutil.copytree(base, tmp_path / "quantized"))
    tiny.edit_json(folder / "config.json", quantization_config={"quant_method": "fp8"})
    scales = {f"{UP}.weight_scale_inv": torch.ones(1, 1)}
    save_file(load_file(folder / "model.safetensors") | scales, folder / "model.safetensors")
    return folder


def test_an_adapter_is_told_in_numbers(base: Path, tmp_path: Path) -> None:
    folder, _ = variants.trained(
        tmp_path / "lora", base, use_rslora=True, rank_pattern={"v_proj": 16}, r=4, lora_alpha=8
    )
    found = suitability.judge(folder, None)
    assert found.variant == ("rsLoRA", "rank_pattern")
    assert (found.ranks, found.scaling) == ((4, 16), (2.0, 4.0))
    assert found.targets == {"down_proj": 2, "q_proj": 2, "v_proj": 2}
    assert found.base_named == str(base) and found.base_weights is None
    assert found.bytes == (folder / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize("name", variants.PLAIN)
def test_plain_pairs_merge_and_swap(base: Path, tmp_path: Path, name: str) -> None:
    found = suitability.judge(
        variants.trained(tmp_path / "lora", base, **variants.PLAIN[name])[0], base
    )
    assert found.merge.works and found.merge.reason == "in float32"
    export = "after `quantserve adapter export`: it carries a copy of the base's lm_head.weight"
    assert found.swap.works
    assert found.swap.reason.startswith(export if name == "head" else "as it is")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("dora", "DoRA rescales"),
        ("embedding", "it adapts the embedding"),
        ("saved-all", "it replaces whole tensors of the base: lm_head.weight, model.embed"),
        ("tokens", "it replaces rows of the embedding"),
        ("bias-lora", "biases were trained"),
        ("lora-bias", "it adds to the base's biases"),
    ],
)
def test_what_is_more_than_pairs_merges_only(tmp_path: Path, name: str, reason: str) -> None:
    settings = {**variants.BEYOND, **variants.BIASED}[name]
    base = variants.base_folder(tmp_path / "base", "qwen2")
    folder, _ = variants.trained(tmp_path / "lora", base, **settings)
    found = suitability.judge(folder, base)
    assert found.merge.works and not found.swap.works and found.usable
    assert reason in found.swap.reason and "adapter merge" in found.swap.reason


def test_a_shifted_start_can_be_exported_where_it_can_be_undone(
    base: Path, quantized: Path, tmp_path: Path
) -> None:
    folder, _ = variants.trained(tmp_path / "lora", base, init_lora_weights="pissa")
    export = "after `quantserve adapter export`: training started from 'pissa'"
    assert suitability.judge(folder, quantized).swap.reason.startswith(export)
    (tmp_path / "pissa_init").rename(tmp_path / "away")
    assert suitability.judge(folder, base).swap.reason.startswith(export)
    without = suitability.judge(folder, quantized).swap
    assert not without.works and "initial adapter, which is not there" in without.reason
    tiny.edit_json(folder / CONFIG, init_lora_weights="loftq")
    found = suitability.judge(folder, base)
    assert found.merge.works and "--training-base residual" in found.merge.reason
    assert not found.swap.works and "LoftQ" in found.swap.reason


def test_merging_tells_what_else_changes(tmp_path: Path) -> None:
    base = variants.base_folder(tmp_path / "base", tied=True)
    head, _ = variants.trained(tmp_path / "head", base, targets=("embed_tokens", "q_proj"))
    assert "the head parts from the embedding" in suitability.judge(head, base).merge.reason
    grown, _ = variants.trained(tmp_path / "grown", base, vocabulary=330)
    assert "the vocabulary becomes 330" in suitability.judge(grown, base).merge.reason


def test_a_quantized_base_takes_no_merge(lora: Path, quantized: Path) -> None:
    found = suitability.judge(lora, quantized)
    assert not found.merge.works and "is quantized: merge into what it was made" in (
        found.merge.reason
    )
    assert found.swap.works


def test_another_base_closes_both_paths(base: Path, lora: Path, tmp_path: Path) -> None:
    wide = write_lora(tmp_path / "wide", {UP: (128, 32)})
    assert not suitability.judge(wide, base).usable
    (lora / LINEAGE).write_text(json.dumps({"format": 1, "base": {"weights": "f" * 64}}))
    found = suitability.judge(lora, base)
    assert not found.usable and "base weights" in found.merge.reason
    known = {"format": 1, "base": {"weights": artifact.weights_fingerprint(base)}}
    (lora / LINEAGE).write_text(json.dumps(known))
    assert suitability.judge(lora, base).swap.works


def test_a_large_rank_says_what_the_server_needs(tmp_path: Path) -> None:
    wide = write_lora(tmp_path / "wide", {UP: (128, 64)}, rank=32)
    assert suitability.judge(wide, None).swap.reason == "as it is, with --max-lora-rank 32"


@pytest.mark.parametrize("edit", [{"architectures": ["T5Model"]}, {}])
def test_a_base_that_is_no_model_is_an_error(lora: Path, tmp_path: Path, edit: Any) -> None:
    if edit:
        variants.base_folder(tmp_path / "base", layers=1)
        tiny.edit_json(tmp_path / "base" / "config.json", **edit)
    with pytest.raises((ArtifactError, SourceError)):
        suitability.judge(lora, tmp_path / "base")
