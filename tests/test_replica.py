"""`proof.replica`: logits of the parent as transformers computes them, of artifacts as a server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from quant import checkpoint
from quant.errors import CompareError, SourceError
from quant.intake import source
from quant.intake.source import Source, Tensors
from quant.proof import replica
from quant.solver import int8
from tests import tiny
from tests.test_pipeline import Made, calibration_file, quantize

pytestmark = pytest.mark.arithmetic

CPU = torch.device("cpu")
IDS = torch.arange(4, 84)[None]


def opened(folder: Path, *adapters: Path) -> Source:
    return source.open(str(folder), adapters=adapters, cache=folder.parent / "cache")


def plain(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    out: Tensor = model(input_ids=IDS, use_cache=False).logits
    return out


@pytest.mark.parametrize("head", ["tied", "own"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_the_parent_is_transformers_own(family: str, head: str, tmp_path: Path) -> None:
    folder = tiny.model_folder(tmp_path / "parent", family, tied=head == "tied")
    model = replica.of_parent(opened(folder), CPU)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert torch.equal(logits(model), logits(plain(folder)))


def test_adapters_are_merged(tmp_path: Path) -> None:
    folder = tiny.model_folder(tmp_path / "parent")
    lora = tiny.adapter_folder(tmp_path / "lora", folder)
    expected = PeftModel.from_pretrained(plain(folder), lora).merge_and_unload()
    found = logits(replica.of_parent(opened(folder, lora), CPU))
    torch.testing.assert_close(found, logits(expected), rtol=1e-4, atol=1e-5)


def made(home: Path, scheme: str) -> Made:
    parent = tiny.model_folder(home / "parent")
    return quantize(parent, home / "out", scheme=scheme, texts=calibration_file(home), samples=8)


def artifact_logits(made: Made) -> Tensor:
    model = replica.of_artifact(opened(made.parent), made.folder, made.manifest, CPU)
    return logits(model)


def served(made: Made, see: Callable[[Tensor], Tensor]) -> Tensor:
    """The dequantized weights in the parent's model, each quantized layer computing with `see`."""
    model = plain(made.parent)
    model.load_state_dict(dict(checkpoint.dequantized(made.folder)), strict=False)
    for layer in made.manifest.layers:
        linear = model.get_submodule(layer.name)
        assert isinstance(linear, nn.Linear)
        linear.register_forward_pre_hook(lambda _, inputs: (see(inputs[0]),))
    return logits(model)


def test_weights_alone_are_quantized_in_w4a16(tmp_path: Path) -> None:
    four = made(tmp_path, "w4a16")
    expected = served(four, lambda inputs: inputs)
    torch.testing.assert_close(artifact_logits(four), expected, rtol=1e-4, atol=1e-5)


def test_a_w8a8_layer_sees_its_input_rounded(tmp_path: Path) -> None:
    eight = made(tmp_path, "w8a8")
    found, expected = artifact_logits(eight), served(eight, int8.as_served)
    blind = served(eight, lambda inputs: inputs)
    # A rounding step that falls the other way moves a logit by far less than rounding itself.
    assert (found - expected).norm() < 0.05 * (blind - expected).norm()


def test_a_parameter_without_a_value_is_named(tmp_path: Path) -> None:
    source = opened(tiny.model_folder(tmp_path / "parent"))
    names = (name for name in source.tensors.names() if name != "model.norm.weight")
    tensors = ((name, source.tensors.get(name)) for name in names)
    with pytest.raises(CompareError, match=r"lacks model\.norm\.weight, which LlamaForCausalLM"):
        replica.of_tensors(source, tensors, CPU, "there")


def test_a_parameter_of_another_shape_is_named_with_both(tmp_path: Path) -> None:
    folder = tiny.model_folder(tmp_path / "parent")
    tiny.edit_json(folder / "config.json", intermediate_size=256)
    with pytest.raises(SourceError, match=r"\.mlp\.\w+\.weight .*128.*256"):
        replica.of_parent(opened(folder), CPU)


def _flipped(tensors: Tensors, name: str) -> Tensor:
    tensor = _READ(tensors, name)
    return tensor.flip(0) if name.endswith("lm_head.weight") else tensor


_READ = Tensors.get


def test_what_our_own_reader_gets_wrong_is_right_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.model_folder(tmp_path / "parent")
    parent = opened(folder)
    monkeypatch.setattr(Tensors, "get", _flipped)
    assert torch.equal(logits(replica.of_parent(parent, CPU)), logits(plain(folder)))


def test_a_head_that_config_json_ties_and_the_file_does_not_is_as_transformers_has_it(
    tmp_path: Path,
) -> None:
    folder = tiny.model_folder(tmp_path / "parent")
    tiny.edit_json(folder / "config.json", tie_word_embeddings=True)
    expected = logits(plain(folder))
    assert torch.equal(logits(replica.of_parent(opened(folder), CPU)), expected)


def test_what_we_made_of_a_folder_comes_after_the_folder(tmp_path: Path) -> None:
    folder, other = (tiny.model_folder(tmp_path / f"{n}", seed=n) for n in range(2))
    misled = replace(opened(folder), folder=other)
    assert torch.equal(logits(replica.of_parent(misled, CPU)), logits(plain(folder)))


def test_a_folder_that_transformers_cannot_open_is_read_as_we_corrected_it(tmp_path: Path) -> None:
    folder = tiny.model_folder(tmp_path / "parent")
    expected = logits(plain(folder))
    tiny.edit_json(folder / "config.json", vocab_size=tiny.VOCAB - 8)
    parent = opened(folder)
    assert parent.folder != folder
    assert torch.equal(logits(replica.of_parent(parent, CPU)), expected)
