"""Anybody's checkpoint of a quantized model as the weights that a server computes with.

AutoGPTQ (v1 and v2, with or without a column index) and compressed-tensors (pack-quantized and
int-quantized). Refuses what it does not know rather than guess at it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from quant import packing

Parts = Mapping[str, Tensor]  # the tensors of one module by the last part of their names


class UnknownFormat(Exception):
    """A checkpoint this file cannot read."""


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Name -> tensor of the full-precision model: quantized weights float32, others as stored."""
    section = _section(folder)
    for module, parts in _modules(folder):
        if "qweight" in parts:
            yield f"{module}.weight", gptq(parts, section)
        elif "weight_packed" in parts or "weight_scale" in parts:
            yield f"{module}.weight", compressed(parts, section)
        else:
            yield from ((f"{module}.{leaf}", tensor) for leaf, tensor in parts.items())
            continue
        if "bias" in parts:
            yield f"{module}.bias", parts["bias"]


def quantized(folder: Path) -> list[str]:
    """Modules whose weights are quantized."""
    marks = {"qweight", "weight_packed", "weight_scale"}
    return [module for module, parts in _modules(folder) if marks & parts.keys()]


def rounds_inputs(folder: Path) -> bool:
    """Whether the layers' inputs are int8 with a scale per token. UnknownFormat for others."""
    section = _section(folder)
    asked = [g["input_activations"] for g in section.get("config_groups", {}).values()]
    if not any(asked):
        return False
    for each in asked:
        known = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
        if not each or any(each.get(key) != value for key, value in known.items()):
            raise UnknownFormat(f"{folder}: inputs quantized as {each}")
    return True


def size(folder: Path) -> int:
    """Bytes of the weight files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def gptq(parts: Parts, section: Mapping[str, Any]) -> Tensor:
    """float32 [out, in] of a layer stored the AutoGPTQ way."""
    bits = section["bits"]
    codes = packing.unpack_gptq(parts["qweight"], bits).float()  # [out, in]
    zeros = packing.unpack_zeros(parts["qzeros"], bits)  # [groups, out], v1: stored one too low
    if section.get("checkpoint_format", section.get("format")) == "gptq_v2":
        zeros = zeros - 1
    group = parts["g_idx"].long() if "g_idx" in parts else _in_order(codes, zeros)
    scale = parts["scales"].float()
    return (codes - zeros.float()[group].T) * scale[group].T


def compressed(parts: Parts, section: Mapping[str, Any]) -> Tensor:
    """float32 [out, in] of a layer stored the compressed-tensors way, symmetric."""
    if "weight_zero_point" in parts and bool(parts["weight_zero_point"].any()):
        raise UnknownFormat("zero points beside symmetric codes")
    scale = parts["weight_scale"].float()  # [out, groups]
    if "weight_packed" in parts:
        (bits,) = {g["weights"]["num_bits"] for g in section["config_groups"].values()}
        rows, columns = parts["weight_shape"].tolist()
        # Rows are packed on their own, the first code lowest, one word after the other.
        codes = packing.unpack_gptq(parts["weight_packed"].T, bits)[:, :columns].float()
        codes -= 1 << (bits - 1)
        assert codes.shape == (rows, columns)
    else:
        codes = parts["weight"].float()
    if "weight_g_idx" in parts:
        return codes * scale[:, parts["weight_g_idx"].long()]
    return (codes.view(*scale.shape, -1) * scale[..., None]).flatten(1)


def _in_order(codes: Tensor, zeros: Tensor) -> Tensor:
    return torch.arange(codes.shape[1]) // (codes.shape[1] // zeros.shape[0])


def _section(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_bytes())
    section: dict[str, Any] = config.get("quantization_config") or config["compression_config"]
    return section


def _modules(folder: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    where: dict[str, dict[str, Path]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 # a file, not a mapping
                module, _, leaf = name.rpartition(".")
                where.setdefault(module, {})[leaf] = file
    for module, leaves in where.items():
        parts = {}
        for leaf, file in leaves.items():
            with safe_open(file, framework="pt") as shard:
                parts[leaf] = shard.get_tensor(f"{module}.{leaf}")
        yield module, parts
