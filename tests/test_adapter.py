"""A LoRA folder: read, refused with the field at fault, and held against its base."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quant import artifact
from quant.errors import AdapterError
from quant.lora import adapter as lora
from quant.lora.adapter import CONFIG, LINEAGE, WEIGHTS, Adapter
from tests import tiny
from tests.lora import write_lora

UP, Q = "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"
SHAPES = {UP: (12, 6), Q: (6, 6)}
A_KEY, B_KEY = (f"base_model.model.{UP}.lora_{side}.weight" for side in "AB")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "legal", SHAPES)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("base"))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def refused(folder: Path) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        lora.read(folder)
    assert str(folder) in str(caught.value)
    return caught.value


def test_an_adapter_is_its_pairs(folder: Path) -> None:
    read = lora.read(folder)
    assert (read.name, read.rank, read.base_fingerprint) == ("legal", 4, None)
    assert read.weights == folder / WEIGHTS
    assert {m: (p.out_features, p.in_features) for m, p in read.pairs.items()} == SHAPES
    assert read.pairs[UP][:2] == (A_KEY, B_KEY)


def test_the_rank_is_the_largest_of_its_modules(folder: Path) -> None:
    tiny.edit_json(folder / CONFIG, rank_pattern={"q_proj": 2})
    key = f"base_model.model.{Q}"
    two = {f"{key}.lora_A.weight": torch.ones(2, 6), f"{key}.lora_B.weight": torch.ones(6, 2)}
    rewrite(folder, lambda tensors: tensors.update(two))
    read = lora.read(folder)
    assert (read.pairs[Q].rank, read.pairs[UP].rank, read.rank) == (2, 4, 4)


def test_equal_files_have_equal_digests(folder: Path, tmp_path: Path) -> None:
    other = write_lora(tmp_path / "copy", SHAPES)
    (other / "README.md").write_text("not part of it")
    assert lora.read(other).digest == lora.read(folder).digest


def test_the_digest_follows_weights_and_config(folder: Path, tmp_path: Path) -> None:
    digests = {lora.read(folder).digest}
    digests.add(lora.read(write_lora(tmp_path / "other", SHAPES, seed=1)).digest)
    tiny.edit_json(folder / CONFIG, lora_alpha=5)
    digests.add(lora.read(folder).digest)
    assert len(digests) == 3


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    fault = refused(tmp_path / "gone")
    assert fault.field == "folder" and "does not exist" in str(fault)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_file_that_is_missing_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    fault = refused(folder)
    assert fault.field == name and f"{name} is missing" in str(fault)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "x.pth"])
def test_a_pickle_is_refused_unread(folder: Path, name: str) -> None:
    (folder / WEIGHTS).rename(folder / name)
    fault = refused(folder)
    assert (fault.field, fault.expected, fault.found) == ("weights", WEIGHTS, name)
    assert "is a pickle, which can run code" in str(fault)


@pytest.mark.parametrize("name", [CONFIG, LINEAGE])
@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "is not JSON"), ("[" * 100_000, "is not JSON"), ("[1]", "is not a JSON object")],
    ids=["cut", "deep", "list"],
)
def test_a_broken_json_file_is_named(folder: Path, name: str, text: str, reason: str) -> None:
    (folder / name).write_text(text)
    fault = refused(folder)
    assert fault.field == name and f"{name} {reason}" in str(fault)


def test_an_enormous_config_is_not_read(folder: Path) -> None:
    os.truncate(folder / CONFIG, (16 << 20) + 1)
    fault = refused(folder)
    assert fault.field == CONFIG and "is larger than 16777216 bytes" in str(fault)


def test_truncated_weights_are_named(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 1)
    fault = refused(folder)
    assert fault.field == WEIGHTS and f"{WEIGHTS} is truncated" in str(fault)


@pytest.mark.parametrize(
    ("key", "tensor"),
    [
        ("base_model.model.model.embed_tokens.lora_embedding_A.weight", torch.ones(4, 6)),
        (f"base_model.model.{UP}.lora_magnitude_vector.weight", torch.ones(12)),
        (f"base_model.model.{UP}.lora_magnitude_vector", torch.ones(12, 1)),
        (f"base_model.model.{UP}.lora_B.bias", torch.ones(11)),
        (f"base_model.model.{UP}.lora_E", torch.ones(4, 1)),
        (f"{UP}.lora_A.weight", torch.ones(4, 6)),
        (f"base_model.model.{UP}.weight_scale", torch.ones(12)),
        (A_KEY, torch.ones(4, 6, 1)),
        (A_KEY, torch.ones(4, 6, dtype=torch.int8)),
        (A_KEY, torch.ones(4, 6, dtype=torch.float64)),
    ],
    ids=[
        "embedding", "magnitude", "column", "bias", "adalora", "prefix", "scale", "conv",
        "integers", "float64",
    ],
)  # fmt: skip
def test_a_tensor_that_is_no_part_of_a_lora_is_refused(
    folder: Path, key: str, tensor: torch.Tensor
) -> None:
    rewrite(folder, lambda tensors: tensors.update({key: tensor}))
    fault = refused(folder)
    assert fault.field == key and f"{key} (" in str(fault)
    assert "is not part of a LoRA" in str(fault)


def test_dora_has_a_magnitude_for_every_module(folder: Path) -> None:
    tiny.edit_json(folder / CONFIG, use_dora=True)
    key = f"base_model.model.{UP}.lora_magnitude_vector"
    rewrite(folder, lambda tensors: tensors.update({key: torch.ones(12)}))
    assert "1 of 2 modules have magnitudes" in str(refused(folder))


@pytest.mark.parametrize("rows", [[1], [1, 2, 3], None])
def test_retrained_rows_are_as_many_as_named(folder: Path, rows: list[int] | None) -> None:
    tiny.edit_json(folder / CONFIG, trainable_token_indices=rows)
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    rewrite(folder, lambda tensors: tensors.update({key: torch.ones(2, 6)}))
    fault = refused(folder)
    assert (fault.field, fault.found) == ("trainable_token_indices", "2")


def test_what_pefts_wrappers_save_twice_is_taken_once(folder: Path) -> None:
    """A head retrained in a grown vocabulary lies in the file under three names."""
    head = "base_model.model.lm_head"
    saved = {
        f"{head}.weight": torch.zeros(8, 6),
        f"{head}.modules_to_save.weight": torch.ones(8, 6),
        f"{head}.original_module.weight": torch.zeros(8, 6),
    }
    rewrite(folder, lambda tensors: tensors.update(saved))
    assert lora.read_trained(folder).parts.whole == {
        "lm_head.weight": f"{head}.modules_to_save.weight"
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_modules", ["q_proj"]),
        ("target_modules", []),
        ("exclude_modules", ["up_proj"]),
        ("layers_to_transform", 7),
        ("layers_to_transform", [7, 8]),
    ],
)
def test_a_pair_that_peft_would_pass_over_is_refused(folder: Path, field: str, value: Any) -> None:
    tiny.edit_json(folder / CONFIG, **{field: value})
    fault = refused(folder)
    assert fault.field == field and fault.found in SHAPES and "PEFT would not" in str(fault)


@pytest.mark.parametrize(
    ("field", "value", "lost"),
    [
        ("modules_to_save", ["lm_head"], "lm_head"),
        ("modules_to_save", ["model.norm", "score"], "model.norm"),
        ("trainable_token_indices", [7, 9], "7"),
        ("trainable_token_indices", {"embed_tokens": [7]}, "embed_tokens"),
    ],
)
def test_what_was_trained_whole_and_not_saved_is_refused(
    folder: Path, field: str, value: Any, lost: str
) -> None:
    tiny.edit_json(folder / CONFIG, **{field: value})
    fault = refused(folder)
    assert (fault.field, fault.expected) == (field, lost)


def test_a_file_without_pairs_is_refused(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.clear())
    assert "holds no LoRA weights" in str(refused(folder))


@pytest.mark.parametrize(("lost", "left"), [(A_KEY, B_KEY), (B_KEY, A_KEY)])
def test_half_a_pair_is_refused(folder: Path, lost: str, left: str) -> None:
    rewrite(folder, lambda tensors: tensors.pop(lost))
    assert f"{left} has no partner" in str(refused(folder))


@pytest.mark.parametrize("rank", [0, 3])
def test_two_sides_of_other_ranks_are_refused(folder: Path, rank: int) -> None:
    rewrite(folder, lambda tensors: tensors.update({B_KEY: torch.ones(12, rank)}))
    fault = refused(folder)
    assert (fault.field, fault.expected, fault.found) == (B_KEY, "4", str(rank))


@pytest.mark.parametrize(
    ("change", "says"), [({"r": 8}, 8), ({"rank_pattern": {r".*\.0\.mlp\.up_proj": 2}}, 2)]
)
def test_a_rank_that_the_config_does_not_say_is_refused(
    folder: Path, change: dict[str, Any], says: int
) -> None:
    tiny.edit_json(folder / CONFIG, **change)
    fault = refused(folder)
    assert (fault.field, fault.expected, fault.found) == (f"{UP} rank", str(says), "4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 11, -1])
def test_a_weight_that_is_no_number_is_refused(
    folder: Path, dtype: torch.dtype, value: float, place: int
) -> None:
    tensor = torch.randn(12, 4).to(dtype)
    tensor.view(-1)[place] = value
    rewrite(folder, lambda tensors: tensors.update({B_KEY: tensor}))
    fault = refused(folder)
    assert (fault.field, fault.expected) == (B_KEY, "finite numbers")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_numbers_are_numbers(folder: Path, dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    extremes = [limits.max, limits.min, limits.tiny, limits.smallest_normal, limits.max / 2, 0.0]
    tensor = torch.tensor(extremes * 8).to(dtype).reshape(12, 4)
    assert tensor.isfinite().all()
    rewrite(folder, lambda tensors: tensors.update({B_KEY: tensor}))
    assert lora.read(folder).rank == 4


def fits(read: Adapter, shapes: dict[str, tuple[int, int]], **limits: Any) -> None:
    lora.validate(read, shapes, **{"max_rank": None, "base_weights_fingerprint": None, **limits})


def misfit(read: Adapter, shapes: dict[str, tuple[int, int]], **limits: Any) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        fits(read, shapes, **limits)
    fault = caught.value
    assert str(fault) == (
        f"adapter {read.folder} does not fit the base: {fault.field}: expected {fault.expected},"
        f" found {fault.found}"
    )
    return fault


def test_an_adapter_fits_the_shapes_it_was_made_for(folder: Path) -> None:
    read = lora.read(folder)
    fits(read, {**SHAPES, "lm_head": (99, 6)}, max_rank=4)


def test_a_module_that_the_base_lacks_is_named(folder: Path) -> None:
    with pytest.raises(AdapterError, match="`quantserve adapter export` writes") as caught:
        fits(lora.read(folder), {Q: (6, 6)})
    assert (caught.value.field, caught.value.expected) == (UP, "no such module in the base")


def test_a_module_of_another_shape_is_named(folder: Path) -> None:
    fault = misfit(lora.read(folder), {**SHAPES, UP: (12, 8)})
    assert (fault.field, fault.expected, fault.found) == (UP, "12x8", "12x6")


def test_a_rank_above_the_limit_is_refused(folder: Path) -> None:
    fault = misfit(lora.read(folder), SHAPES, max_rank=3)
    assert (fault.field, fault.expected, fault.found) == ("rank", "at most 3", "4")


def test_a_transposed_base_is_compared_transposed(folder: Path) -> None:
    tiny.edit_json(folder / CONFIG, fan_in_fan_out=True)
    fits(lora.read(folder), {UP: (6, 12), Q: (6, 6)})
    assert misfit(lora.read(folder), SHAPES).found == "6x12"


def test_lineage_holds_an_adapter_to_its_base(folder: Path) -> None:
    (folder / LINEAGE).write_text(json.dumps({"format": 1, "base": {"weights": "a" * 64}}))
    read = lora.read(folder)
    assert read.base_fingerprint == "a" * 64
    fits(read, SHAPES, base_weights_fingerprint="a" * 64)
    fits(read, SHAPES)
    fault = misfit(read, SHAPES, base_weights_fingerprint="b" * 64)
    assert (fault.field, fault.expected, fault.found) == ("base weights", "b" * 12, "a" * 12)


@pytest.mark.parametrize(
    "lineage",
    [
        {},
        {"format": 2, "base": {"weights": "a"}},
        {"format": 1, "base": "a"},
        {"format": 1, "base": {"weights": 7}},
    ],
)
def test_a_lineage_of_another_format_is_refused(folder: Path, lineage: dict[str, Any]) -> None:
    (folder / LINEAGE).write_text(json.dumps(lineage))
    fault = refused(folder)
    assert (fault.field, fault.found) == (LINEAGE, json.dumps(lineage))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"r": 6, "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 3}},
        {"use_rslora": True, "rank_pattern": {"v_proj": 9}, "alpha_pattern": {"v_proj": 5}},
    ],
    ids=["plain", "rslora", "ranks", "both"],
)
def test_pefts_own_folder_reads_with_pefts_own_scaling(
    base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    read = lora.read(tiny.adapter_folder(tmp_path / "lora", base, **settings))
    fits(read, artifact.linear_shapes(base))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = PeftModel.from_pretrained(model, read.folder)
    assert len(read.pairs) == 6
    for module, pair in read.pairs.items():
        layer = peft.get_submodule(f"base_model.model.{module}")
        assert read.pairs[module].scale == pytest.approx(layer.scaling["default"])
        assert pair.rank == layer.r["default"]


@pytest.mark.parametrize(
    ("field", "value"), [("layer_replication", [[0, 2], [1, 2]]), ("use_qalora", True)]
)
def test_what_nothing_here_computes_is_refused(folder: Path, field: str, value: Any) -> None:
    tiny.edit_json(folder / CONFIG, **{field: value})
    assert refused(folder).field == field


@pytest.mark.parametrize(
    ("field", "value", "instead"),
    [
        ("use_dora", True, "merge"),
        ("bias", "all", "merge"),
        ("lora_bias", True, "merge"),
        ("modules_to_save", ["lm_head"], "merge"),
        ("trainable_token_indices", [5, 6], "merge"),
        ("init_lora_weights", "pissa", "export"),
        ("init_lora_weights", "olora", "export"),
        ("rank_pattern", {r"(self_attn\.)+q_proj": 4}, "export"),
        ("alpha_pattern", {"l?a?y?e?r?s?.?0?.?q_proj": 4}, "export"),
        ("alpha_pattern", {r"layers\.[0-9]+\..*\.(q|k)_proj.*": 4}, "export"),
    ],
)
def test_what_cannot_be_served_is_refused_with_what_works(
    base: Path, tmp_path: Path, field: str, value: Any, instead: str
) -> None:
    folder = tiny.adapter_folder(tmp_path / "x", base, **{field: value})
    fault = refused(folder)
    assert fault.field == field and f"use `quantserve adapter {instead}`" in str(fault)
    assert lora.read_trained(folder).folder == folder


def test_the_initial_adapter_is_found_in_the_folder_or_beside_it(
    folder: Path, tmp_path: Path
) -> None:
    tiny.edit_json(folder / CONFIG, init_lora_weights="pissa_niter_4")
    assert lora.read_trained(folder).initial is None
    beside = write_lora(tmp_path / "pissa_init", SHAPES)
    assert lora.read_trained(folder).initial == beside
    inside = write_lora(folder / "pissa_init", SHAPES)
    assert lora.read_trained(folder).initial == inside
    tiny.edit_json(folder / CONFIG, init_lora_weights=True)
    assert lora.read_trained(folder).initial is None
