"""`quant.checkpoint`: what is written reads back, here and by those who defined the formats."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import pytest
import torch
from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig

from quant import artifact, checkpoint, formats
from quant.checkpoint import Layer
from quant.errors import ArtifactError
from quant.formats import FULL, Format, Plan
from quant.recipe import Scheme
from quant.shards import Writer
from tests import tiny
from tests.test_packing import autogptq_dequantize

SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
BITS = {"w4a16": 4, "w8a16": 8}
ROWS, COLUMNS, GROUP = 24, 64, 32


def layer(scheme: Scheme, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Layer:
    draw = torch.Generator().manual_seed(seed)
    top = 7 if scheme == "w4a16" else 127
    low = -top if scheme == "w8a8" else -top - 1
    codes = torch.randint(low, top + 1, (ROWS, COLUMNS), generator=draw, dtype=torch.int8)
    scale = torch.rand(ROWS, 1 if scheme == "w8a8" else COLUMNS // GROUP, generator=draw) + 0.01
    return Layer(codes, scale if scheme == "w8a8" else scale.to(dtype).float())


def written(folder: Path, scheme: Scheme, count: int = 3) -> list[str]:
    """A checkpoint of `count` layers with a norm between them; the layers' names."""
    folder.mkdir()
    writer = Writer(folder)
    names = [f"model.layers.{place}.proj" for place in range(count)]
    for place, name in enumerate(names):
        for kind, tensor in checkpoint.encode(
            form(scheme), layer(scheme, place), torch.bfloat16
        ).items():
            writer.add(f"{name}.{kind}", tensor)
        writer.add(f"{name}.bias", torch.full((ROWS,), float(place)))
        writer.add(f"model.layers.{place}.norm.weight", torch.ones(COLUMNS).bfloat16())
    writer.close()
    section = formats.section(scheme, plan(scheme, names))
    (folder / "config.json").write_text(json.dumps({"quantization_config": section}))
    return names


def form(scheme: Scheme) -> Format:
    return formats.of_scheme(scheme, GROUP)


def plan(scheme: Scheme, names: list[str]) -> Plan:
    return dict.fromkeys(names, form(scheme))


def digests(scheme: Scheme, names: list[str]) -> dict[str, str]:
    return {name: layer(scheme, place).digest() for place, name in enumerate(names)}


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """Writes beyond `size` fail with EFBIG, as they fail with ENOSPC on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_comes_back_from_its_tensors(scheme: Scheme, dtype: torch.dtype) -> None:
    chosen = layer(scheme, dtype=dtype)
    back = checkpoint.decode(form(scheme), checkpoint.encode(form(scheme), chosen, dtype))
    assert torch.equal(back.codes, chosen.codes) and torch.equal(back.scale.float(), chosen.scale)
    assert back.digest() == chosen.digest()
    assert torch.equal(back.weight(), chosen.weight())


@pytest.mark.parametrize("scheme", ["w4a16", "w8a16"])
def test_autogptqs_formula_reads_the_same_weights(scheme: Scheme) -> None:
    chosen = layer(scheme)
    tensors = checkpoint.encode(form(scheme), chosen, torch.bfloat16)
    assert {kind: tensor.dtype for kind, tensor in tensors.items()} == {
        "qweight": torch.int32,
        "qzeros": torch.int32,
        "scales": torch.bfloat16,
        "g_idx": torch.int32,
    }
    theirs = autogptq_dequantize(tensors, BITS[scheme])
    assert torch.equal(theirs.float(), chosen.weight())


def test_compressed_tensors_reads_the_same_weights() -> None:
    chosen = layer("w8a8")
    config = QuantizationConfig.model_validate(formats.section("w8a8", {"a": formats.INT8}))
    assert config.format == "int-quantized" and config.ignore == ["lm_head"]
    scheme = config.config_groups["group_0"]
    tensors = checkpoint.encode(formats.INT8, chosen, torch.bfloat16)
    assert set(tensors) == set(IntQuantizationCompressor.compression_param_names(scheme))
    theirs = IntQuantizationCompressor.decompress(tensors, scheme)
    assert torch.equal(theirs["weight"].float(), chosen.weight())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_size_of_a_layer_is_known_before_it_is_made(scheme: Scheme) -> None:
    tensors = checkpoint.encode(form(scheme), layer(scheme), torch.bfloat16)
    size = form(scheme).stored((ROWS, COLUMNS))
    assert size == sum(tensor.nbytes for tensor in tensors.values())
    loaded = sum(tensor.nbytes for kind, tensor in tensors.items() if kind != "g_idx")
    assert form(scheme).payload((ROWS, COLUMNS)) == loaded


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_checkpoint_verifies_against_what_was_chosen(scheme: Scheme, tmp_path: Path) -> None:
    names = written(tmp_path / "out", scheme)
    checkpoint.verify(tmp_path / "out", digests(scheme, names), plan(scheme, names))
    assert [name for name, _ in checkpoint.read_layers(tmp_path / "out")] == names


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("part", ["codes", "scales"])
def test_one_flipped_bit_is_found(scheme: Scheme, part: str, tmp_path: Path) -> None:
    names = written(tmp_path / "out", scheme)
    leaf = {"codes": "weight", "scales": "weight_scale"}[part]
    if scheme != "w8a8":
        leaf = {"codes": "qweight", "scales": "scales"}[part]
    header = artifact.headers(tmp_path / "out")[f"{names[1]}.{leaf}"]
    with (tmp_path / "out" / header.file).open("r+b") as file:
        file.seek(header.begin + 5)
        byte = file.read(1)[0]
        file.seek(header.begin + 5)
        file.write(bytes([byte ^ 0b10]))
    with pytest.raises(ArtifactError, match=f"{names[1]} does not read back"):
        checkpoint.verify(tmp_path / "out", digests(scheme, names), plan(scheme, names))


def test_a_format_that_config_does_not_tell_is_found(tmp_path: Path) -> None:
    names = written(tmp_path / "out", "w4a16")
    chosen = digests("w4a16", names)
    mixed = {**plan("w4a16", names), names[1]: Format(8, GROUP)}
    told = r"config\.json says 4-bit groups of 32 of model\.layers\.1\.proj, which has 8-bit"
    with pytest.raises(ArtifactError, match=told):
        checkpoint.verify(tmp_path / "out", chosen, mixed)
    tiny.edit_json(
        tmp_path / "out" / "config.json", quantization_config=formats.section("w4a16", mixed)
    )
    with pytest.raises(ArtifactError, match=f"{names[1]} does not read back"):
        checkpoint.verify(tmp_path / "out", chosen, mixed)


def test_codes_of_a_layer_that_config_calls_whole_are_found(tmp_path: Path) -> None:
    names = written(tmp_path / "out", "w4a16")
    section = formats.section("w4a16", {**plan("w4a16", names), names[2]: FULL})
    tiny.edit_json(tmp_path / "out" / "config.json", quantization_config=section)
    with pytest.raises(ArtifactError, match=f"full precision of {names[2]}, which has codes"):
        list(checkpoint.dequantized(tmp_path / "out"))


def test_a_layer_that_was_never_written_is_found(tmp_path: Path) -> None:
    names = written(tmp_path / "out", "w4a16")
    chosen = digests("w4a16", names) | {"model.layers.9.proj": "0" * 64}
    with pytest.raises(ArtifactError, match=r"lacks the layer model\.layers\.9\.proj"):
        checkpoint.verify(tmp_path / "out", chosen, {})


def test_a_layer_nobody_chose_is_found(tmp_path: Path) -> None:
    names = written(tmp_path / "out", "w4a16")
    chosen = digests("w4a16", names)
    del chosen[names[2]]
    with pytest.raises(ArtifactError, match=names[2]):
        checkpoint.verify(tmp_path / "out", chosen, {})


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dequantized_tensors_carry_the_parents_names(scheme: Scheme, tmp_path: Path) -> None:
    names = written(tmp_path / "out", scheme)
    plain = dict(checkpoint.dequantized(tmp_path / "out"))
    norms = {f"model.layers.{place}.norm.weight" for place in range(3)}
    assert set(plain) == {f"{n}.{leaf}" for n in names for leaf in ("weight", "bias")} | norms
    for place, name in enumerate(names):
        assert torch.equal(plain[f"{name}.weight"], layer(scheme, place).weight())
        assert bool((plain[f"{name}.bias"] == place).all())


def test_a_folder_quantized_by_others_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "out", "w4a16")
    tiny.edit_json(tmp_path / "out" / "config.json", quantization_config={"quant_method": "awq"})
    with pytest.raises(ArtifactError, match="'awq' None is no quantization this program writes"):
        list(checkpoint.read_layers(tmp_path / "out"))


def test_config_keeps_what_the_parent_says(tmp_path: Path) -> None:
    parent, out = tmp_path / "parent", tmp_path / "out"
    for folder in (parent, out):
        folder.mkdir()
    (parent / "config.json").write_text(
        json.dumps({"rope_theta": 5e5, "model_type": "llama", "torch_dtype": "float32"})
    )
    checkpoint.write_config(parent, out, {"quant_method": "gptq"}, torch.bfloat16)
    assert json.loads((out / "config.json").read_text()) == {
        "rope_theta": 5e5,
        "model_type": "llama",
        "dtype": "bfloat16",
        "quantization_config": {"quant_method": "gptq"},
    }
