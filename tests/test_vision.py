"""Vision-language models: the language part is quantized, what sees is kept bit for bit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from quant import artifact, checkpoint, formats
from quant.errors import AdapterError
from quant.formats import FULL
from quant.intake import source
from quant.proof import compare, replica
from quant.recipe import Draw
from tests import tiny
from tests.test_compare import Told as Heard
from tests.test_pipeline import Made, calibration_file, quantize, shift

CPU = torch.device("cpu")
PROCESSOR = '{"image_processor_type": "CLIPImageProcessor"}'
LANGUAGE = {  # what the hub's checkpoints call the first block
    "qwen2_5_vl": "model.layers.0.",
    "llava": "language_model.model.layers.0.",
    "gemma3": "language_model.model.layers.0.",
}
TOWERS = re.compile(r"^(visual|vision_tower|multi_modal_projector)\.")


@dataclass(frozen=True)
class Case:
    made: Made
    family: str

    @property
    def section(self) -> dict[str, Any]:
        return artifact.quantization_config(self.made.folder) or {}


@pytest.fixture(scope="module", params=[*((f, "w4a16") for f in tiny.SEEING), ("llava", "w8a8")])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, scheme = request.param
    home = tmp_path_factory.mktemp(family)
    parent = tiny.model_folder(home / "parent", family)
    (parent / "preprocessor_config.json").write_text(PROCESSOR)
    asked: dict[str, Any] = {"texts": calibration_file(home), "scheme": scheme}
    return Case(quantize(parent, home / "out", **asked), family)


def whole(folder: Path) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32
    )
    return loaded.eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.randint(9, tiny.VOCAB, (4, 48), generator=torch.Generator().manual_seed(1))
    out: Tensor = model(input_ids=ids, use_cache=False).logits
    return out


def test_the_language_part_is_quantized_under_the_checkpoints_names(case: Case) -> None:
    names = [layer.name for layer in case.made.manifest.layers]
    first = [name for name in names if name.startswith(LANGUAGE[case.family])]
    assert len(names) == 2 * 7 and len(first) == 7
    before = load_file(case.made.parent / "model.safetensors")
    assert {f"{name}.weight" for name in names} <= before.keys()
    assert dict(checkpoint.dequantized(case.made.folder)).keys() == before.keys()


def test_what_sees_is_kept_bit_for_bit_and_config_json_says_so(case: Case) -> None:
    before, after = load_file(case.made.parent / "model.safetensors"), case.made.tensors
    seeing = [name for name in before if TOWERS.match(name)]
    assert len(seeing) > 20
    for name in seeing:
        assert torch.equal(before[name], after[name])
        assert formats.of_layer(case.section, name) == FULL
    assert (case.made.folder / "preprocessor_config.json").read_text() == PROCESSOR


def test_the_parts_of_a_model_answer_as_the_whole_did(case: Case) -> None:
    opened = source.open(str(case.made.parent), cache=case.made.folder.parent / "cache")
    expected = logits(whole(case.made.parent))
    parent = replica.of_parent(opened, CPU)
    torch.testing.assert_close(logits(parent), expected, rtol=1e-4, atol=1e-5)
    ours = replica.of_artifact(opened, case.made.folder, case.made.manifest, CPU)
    # The weights are noise, which has no redundancy to spare.
    assert 0 < shift(logits(ours), expected) < 0.2


def test_no_layer_is_worse_than_rounded(case: Case) -> None:
    for layer in case.made.manifest.layers:
        assert layer.loss <= layer.rounding_loss, layer.name


def test_it_can_be_compared_on_text(case: Case, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog and runs at night, " * 30)
    order = compare.Order(str(case.made.parent), case.made.folder, text=text, cache=tmp_path)
    found = compare.run(Draw(windows=4, length=32), order, Heard())
    assert found.fidelity.text is not None
    assert 0 < found.fidelity.text.mean_kl.value < 0.2


def test_it_writes_its_own_calibration_text(tmp_path: Path) -> None:
    parent = tiny.model_folder(tmp_path / "parent", "qwen2_5_vl")
    made = quantize(parent, tmp_path / "out", samples=2, length=32)
    assert made.manifest.calibration.origin == "self-generated"


def test_an_adapter_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    base = tiny.model_folder(tmp_path / "text")
    lora = tiny.adapter_folder(tmp_path / "lora", base)
    parent = tiny.model_folder(tmp_path / "parent", "llava")
    with pytest.raises(AdapterError, match=r"_proj\.weight: no such tensor in the base"):
        source.open(str(parent), adapters=[lora], cache=tmp_path)


def test_rules_of_a_mixed_plan_hold_wherever_a_server_puts_the_language_model(
    tmp_path: Path,
) -> None:
    parent, texts = tiny.model_folder(tmp_path / "parent", "llava"), calibration_file(tmp_path)
    made = quantize(parent, tmp_path / "out", texts=texts, samples=8, bits_per_weight=6)
    section = artifact.quantization_config(made.folder) or {}
    assert len({(layer.bits, layer.group) for layer in made.manifest.layers}) > 1
    for layer in made.manifest.layers:
        _, inside = layer.name.split(".layers.")
        for home in ("language_model.model", "model.language_model", "model"):
            told = formats.of_layer(section, f"{home}.layers.{inside}")
            assert (told.bits, told.group) == (layer.bits, layer.group)
        assert formats.of_layer(section, f"vision_tower.encoder.layers.{inside}") == FULL
