"""An adapter's names beside its base's: whatever leads to one of its tensors is found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant.errors import AdapterError
from quant.intake import architecture, fused
from quant.lora import adapter as lora
from quant.lora import anatomy, placement
from quant.lora.adapter import CONFIG, WEIGHTS, Adapter
from quant.lora.anatomy import Anatomy
from tests import tiny, variants
from tests.adapter_rows import renamed
from tests.lora import write_lora

QUERY, UP = "layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"
HOMES = ("language_model.model.", "model.language_model.")


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with variants.one_thread():
        yield


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return variants.base_folder(tmp_path_factory.mktemp("mixture"), "qwen3_moe", layers=2)


def parts_of(base: Path) -> Anatomy:
    return anatomy.of(architecture.config(base), fused.headers(base))


def placed(folder: Path, base: Path) -> Adapter:
    return placement.placed(lora.read_trained(folder), parts_of(base).names)


def refused(folder: Path, base: Path) -> str:
    with pytest.raises(AdapterError) as caught:
        parts = parts_of(base)
        found = placement.placed(lora.read_trained(folder), parts.names)
        shapes = {name: header.shape for name, header in fused.headers(base).items()}
        anatomy.plan(parts, shapes, [found])
    return str(caught.value)


@pytest.mark.parametrize(("family", "stored"), [("gemma3", HOMES[0]), ("qwen2_5_vl", "model.")])
def test_a_language_part_is_found_by_the_names_of_every_transformers(
    tmp_path: Path, family: str, stored: str
) -> None:
    base = tiny.model_folder(tmp_path / "base", family)
    names = set(fused.headers(base))
    homes = {HOMES[1], stored} | ({HOMES[0]} if family == "gemma3" else set())
    for place, home in enumerate(sorted(homes)):
        shapes = {f"{home}{name}": (4, 4) for name in (QUERY, UP)}
        found = placed(write_lora(tmp_path / str(place), shapes), base)
        assert list(found.pairs) == [f"{stored}{QUERY}", f"{stored}{UP}"]
        assert found.parts.tensors() <= names


def test_a_head_is_found_by_either_name(tmp_path: Path) -> None:
    base = tiny.model_folder(tmp_path / "base", "gpt_neox")
    assert parts_of(base).head == "embed_out.weight"
    for name in ("lm_head", "embed_out"):
        found = placed(write_lora(tmp_path / name, {name: (tiny.VOCAB, 64)}), base)
        assert list(found.pairs) == ["embed_out"]


@pytest.mark.parametrize("lost", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_base_without_an_end_is_named(tmp_path: Path, lost: str) -> None:
    base = tiny.model_folder(tmp_path / "base", layers=1)
    held = load_file(base / "model.safetensors")
    del held[lost]
    save_file(held, base / "model.safetensors")
    lora = write_lora(tmp_path / "lora", {f"model.{QUERY}": (64, 64)})
    assert f"the base has no {lost}" in refused(lora, base)


def test_both_names_of_one_tensor_are_refused(tmp_path: Path) -> None:
    base = tiny.model_folder(tmp_path / "base", "gemma3")
    both = write_lora(tmp_path / "both", {f"{home}{QUERY}": (128, 64) for home in HOMES})
    assert f"changes {HOMES[0]}{QUERY}.weight of the base twice" in refused(both, base)


@pytest.mark.parametrize("home", ["model.", "vision.", "model.text_model."])
def test_what_leads_nowhere_is_refused_by_its_own_name(tmp_path: Path, home: str) -> None:
    base = tiny.model_folder(tmp_path / "base", "gemma3")
    lost = write_lora(tmp_path / "lost", {f"{home}{QUERY}": (128, 64)})
    assert f"{home}{QUERY}.weight: no such tensor in the base" in refused(lost, base)


def _drop(keys: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda held: {key: held[key] for key in held if keys not in key}


def _fewer(held: dict[str, Tensor]) -> dict[str, Tensor]:
    """Ranks of five experts, where there are six."""
    return {
        key: (tensor[:20] if ".lora_A" in key else tensor[:, :20]).clone()
        for key, tensor in held.items()
    }


def _turned(held: dict[str, Tensor]) -> dict[str, Tensor]:
    """As PEFT 0.17 wrote them: the sides of a stack [experts, out, in] swapped."""
    shapes = {key: held[key.replace("lora_A", "lora_B")].shape[0] for key in held if "_A" in key}
    turned = {key: torch.ones(len(held[key]), width) for key, width in shapes.items()}
    widths = {key: held[key.replace("lora_B", "lora_A")].shape[1] for key in held if "_B" in key}
    return turned | {key: torch.ones(width, held[key].shape[1]) for key, width in widths.items()}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_drop("base_layer"), "has 1 pairs on model.layers.1.mlp.experts, and target_parameters"),
        (_fewer, "experts.down_proj is [6, 64, 96] there, and the adapter has A [20, 96]"),
        (_turned, "experts.down_proj is [6, 64, 96] there, and the adapter has A [24, 64]"),
    ],
)
def test_experts_that_do_not_fit_are_refused(
    mixture: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    says: str,
) -> None:
    folder, _ = variants.trained(
        tmp_path / "lora", mixture, targets=(), target_parameters=["gate_up_proj", "down_proj"]
    )
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    assert says in refused(folder, mixture)


def test_experts_without_their_configuration_are_refused(mixture: Path, tmp_path: Path) -> None:
    folder, _ = variants.trained(
        tmp_path / "lora", mixture, targets=(), target_parameters=["gate_up_proj", "down_proj"]
    )
    for wrong, says in (([], "names no target_parameters"), (["up"], "names 0 of the parameters")):
        tiny.edit_json(folder / CONFIG, target_parameters=wrong)
        assert says in refused(folder, mixture)
    tiny.edit_json(folder / CONFIG, target_parameters=["gate_up_proj", "down_proj"], r=5)
    assert "experts.down_proj has rank 4, adapter_config.json says 5" in refused(folder, mixture)


def test_experts_of_a_dense_base_are_refused(mixture: Path, tmp_path: Path) -> None:
    dense = variants.base_folder(tmp_path / "dense")
    folder, _ = variants.trained(
        tmp_path / "lora", mixture, targets=(), target_parameters=["down_proj"]
    )
    assert "target_parameters names 0" in refused(folder, dense)


def test_names_that_wrappers_left_are_those_of_the_model(mixture: Path, tmp_path: Path) -> None:
    plain = write_lora(tmp_path / "plain", {f"model.{QUERY}": (128, 64)})
    wanted = placed(plain, mixture)
    for place, change in enumerate((
        lambda key: f"_orig_mod.{key}",
        lambda key: f"module.module.{key}",
        lambda key: key.replace(".model.model.", ".model._orig_mod.module.model.", 1),
        lambda key: key.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
        lambda key: key.replace(".weight", ".default.weight"),
        lambda key: key.replace(".weight", ".my-run_2.weight"),
    )):  # fmt: skip
        folder = write_lora(tmp_path / str(place), {f"model.{QUERY}": (128, 64)})
        renamed(change)(folder)
        found = placed(folder, mixture)
        assert list(found.pairs) == list(wanted.pairs)
        assert found.parts.foreign is not None and wanted.parts.foreign is None


def test_one_tensor_of_two_adapters_is_refused(mixture: Path, tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "two", {f"model.{QUERY}": (128, 64)})
    held = load_file(folder / WEIGHTS)
    more = {key.replace(".weight", ".other.weight"): tensor.clone() for key, tensor in held.items()}
    save_file(held | more, folder / WEIGHTS)
    assert "are the same tensor of two adapters" in refused(folder, mixture)
