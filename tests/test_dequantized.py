"""`bench.dequantized`: the rivals' formats, against the libraries that write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import save_file
from torch import Tensor

from bench import dequantized
from quant import checkpoint, packing
from quant.checkpoint import Layer
from quant.formats import Format
from quant.recipe import Scheme
from tests import tiny
from tests.test_pipeline import calibration_file, quantize

ROWS, COLUMNS, GROUP = 16, 64, 32


def codes_and_scale() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    codes = torch.randint(-8, 8, (ROWS, COLUMNS), dtype=torch.int8)
    return codes, torch.rand(ROWS, COLUMNS // GROUP) + 0.1


def written(folder: Path, tensors: Mapping[str, Tensor], section: Mapping[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"quantization_config": section}))
    save_file({f"model.q.{leaf}": t.contiguous() for leaf, t in tensors.items()},
              folder / "model.safetensors")  # fmt: skip
    return folder


def read(folder: Path) -> Tensor:
    return dict(dequantized.tensors(folder))["model.q.weight"]


def config_groups(bits: int, inputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    weights = {"num_bits": bits, "symmetric": True}
    return {"config_groups": {"group_0": {"weights": weights, "input_activations": inputs}}}


@pytest.mark.parametrize("scheme", ["w4a16", "w8a16", "w8a8"])
def test_our_own_artifacts_read_as_the_product_reads_them(scheme: Scheme, tmp_path: Path) -> None:
    parent = tiny.model_folder(tmp_path / "parent")
    out = tmp_path / "out"
    quantize(parent, out, calibration_file=calibration_file(tmp_path), scheme=scheme)
    ours = dict(checkpoint.dequantized(out))
    theirs = dict(dequantized.tensors(out))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor.float(), theirs[name].float()) for name, tensor in ours.items())
    assert dequantized.rounds_inputs(out) is (scheme == "w8a8")


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_a_column_index_says_whose_scale_a_column_has(version: str, tmp_path: Path) -> None:
    codes, scale = codes_and_scale()
    index = torch.randperm(COLUMNS) % (COLUMNS // GROUP)
    tensors = checkpoint.encode(Format(4, GROUP), Layer(codes, scale), torch.float32)
    tensors["g_idx"] = index.to(torch.int32)
    if version == "gptq_v2":
        zeros = torch.full((COLUMNS // GROUP, ROWS), 8, dtype=torch.int32)
        tensors["qzeros"] = packing.pack_zeros(zeros + 1, 4)
    made = written(tmp_path / "m", tensors, {"bits": 4, "checkpoint_format": version})
    assert torch.equal(read(made), codes.float() * scale[:, index])


def test_packed_codes_are_what_compressed_tensors_packed(tmp_path: Path) -> None:
    codes, scale = codes_and_scale()
    tensors = {
        "weight_packed": pack_to_int32(codes, 4),
        "weight_scale": scale,
        "weight_shape": torch.tensor([ROWS, COLUMNS]),
    }
    made = written(tmp_path / "m", tensors, config_groups(4))
    assert torch.equal(read(made), codes * scale.repeat_interleave(GROUP, dim=1))


def test_int8_inputs_are_told_from_what_is_not_known(tmp_path: Path) -> None:
    tensors = {"weight": torch.ones(2, 4, dtype=torch.int8), "weight_scale": torch.ones(2, 1)}
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    known = written(tmp_path / "known", tensors, config_groups(8, inputs))
    assert dequantized.rounds_inputs(known)
    assert dequantized.quantized(known) == ["model.q"]
    odd = written(tmp_path / "odd", tensors, config_groups(8, inputs | {"strategy": "tensor"}))
    with pytest.raises(dequantized.UnknownFormat, match="tensor"):
        dequantized.rounds_inputs(odd)


def test_zero_points_beside_symmetric_codes_are_refused(tmp_path: Path) -> None:
    tensors = {
        "weight": torch.ones(2, 4, dtype=torch.int8),
        "weight_scale": torch.ones(2, 1),
        "weight_zero_point": torch.ones(2, 1, dtype=torch.int8),
    }
    made = written(tmp_path / "m", tensors, config_groups(8))
    with pytest.raises(dequantized.UnknownFormat, match="zero point"):
        read(made)
