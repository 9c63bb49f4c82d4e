"""`lora.footing`: what adapters sit on comes in by the door that `quantize` has."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant import artifact
from quant.errors import ArtifactError, QuantError, SourceError
from quant.lora import blend, export, footing, suitability
from quant.lora.mixture import Mixture
from tests import tiny
from tests.lora import write_lora
from tests.test_door import CONFIGS, FILE, TENSORS, WRAPPED, Writer, pickled, refused, written
from tests.test_export import Heard
from tests.test_pipeline import calibration_file, quantize

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora(tmp_path_factory.mktemp("lora") / "lora", {UP: (128, 64)})


def check(lora: Path, base: Path, home: Path) -> None:
    suitability.judge(lora, base, home / "cache")


def exported(lora: Path, base: Path, home: Path) -> None:
    export.run(export.Order(lora, base, home / "out", cache=home / "cache"), Heard())


def merge(lora: Path, base: Path, home: Path) -> None:
    order = blend.Order(str(base), home / "out", (lora,), Mixture((1.0,)), cache=home / "cache")
    blend.run(order, Heard())


@pytest.mark.parametrize("fault", [*TENSORS, *CONFIGS])
def test_a_base_is_refused_in_the_words_of_quantize(
    plain: Path, lora: Path, tmp_path: Path, fault: str
) -> None:
    change = TENSORS[fault][0] if fault in TENSORS else dict
    config = CONFIGS[fault][0] if fault in CONFIGS else {}
    folder = written(plain, tmp_path / "base", tiny_file, change(load_file(plain / FILE)), **config)
    told = refused(folder)
    for command in (check, exported, merge):
        with pytest.raises(SourceError) as caught:
            command(lora, folder, tmp_path)
        assert str(caught.value) == told
        assert not (tmp_path / "out").exists()


def tiny_file(folder: Path, state: Any) -> None:
    save_file({name: tensor.clone() for name, tensor in state.items()}, folder / FILE)


@pytest.mark.parametrize("write", [tiny_file, pickled])
@pytest.mark.parametrize("wrapper", ["none", "both", "without its head's model"])
def test_whatever_quantize_takes_is_a_base(
    plain: Path, lora: Path, tmp_path: Path, write: Writer, wrapper: str
) -> None:
    renamed = WRAPPED.get(wrapper, str)
    state = {renamed(name): tensor for name, tensor in load_file(plain / FILE).items()}
    folder = written(plain, tmp_path / "base", write, state)
    assert suitability.judge(lora, folder, tmp_path / "cache") == suitability.judge(lora, plain)
    exported(lora, folder, tmp_path)
    made = tmp_path / "out" / "adapter_model.safetensors"
    export.run(export.Order(lora, plain, tmp_path / "wanted"), Heard())
    assert made.read_bytes() == (tmp_path / "wanted" / made.name).read_bytes()


def test_a_folder_of_another_quantizer_has_no_parent(plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "quantized"))
    tiny.edit_json(folder / "config.json", quantization_config={"quant_method": "fp8"})
    state = load_file(folder / FILE) | {f"{UP}.weight_scale_inv": torch.ones(1, 1)}
    save_file(state, folder / FILE)
    base = footing.base_of(folder)
    assert base.quantized and base.shapes()[UP] == (128, 64)
    with pytest.raises(ArtifactError, match=rf"no {artifact.MANIFEST} that names its parent"):
        _ = base.parent


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2': expected a whole number"),
        ({"hidden_act": "none"}, "describes no Llama that can be built"),
    ],
    ids=["typed", "built"],
)
def test_an_artifacts_config_is_held_to_the_same(
    plain: Path, lora: Path, tmp_path: Path, edit: dict[str, Any], told: str
) -> None:
    made = quantize(plain, tmp_path / "made", texts=calibration_file(tmp_path), samples=2)
    tiny.edit_json(made.folder / "config.json", **edit)
    for command in (check, exported):
        with pytest.raises(QuantError) as caught:
            command(lora, made.folder, tmp_path)
        assert told in str(caught.value)
