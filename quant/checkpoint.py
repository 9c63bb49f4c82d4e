"""Tensors exactly as stock vLLM loads them, and back.

W4A16 and W8A16 are AutoGPTQ checkpoints ("gptq", v1), W8A8 is compressed-tensors
"int-quantized". Owns tensor names and dtypes; bit layout is `quant.packing`'s, which layer has
which format `quant.formats`'. Refuses to leave a layer behind that does not read back as what the
solver chose.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from quant import artifact, companions, foreign_json, interrupt, packing
from quant.errors import ArtifactError
from quant.formats import FULL, Format, Plan
from quant.solver import gptq


@dataclass(frozen=True, slots=True)
class Layer:
    """A quantized linear layer: signed codes int8 [out, in], scale [out, groups] as stored."""

    codes: Tensor
    scale: Tensor

    def digest(self) -> str:
        digest = hashlib.sha256(self.codes.cpu().contiguous().numpy().data)
        digest.update(self.scale.cpu().float().contiguous().numpy().data)
        return digest.hexdigest()

    def weight(self) -> Tensor:
        """float32 [out, in]."""
        return gptq.dequantize(self.codes, self.scale)


def encode(form: Format, layer: Layer, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of one layer by the last part of their names; scales in `dtype` where they may."""
    if form.inputs == 8:
        return {"weight": layer.codes, "weight_scale": layer.scale.float()}
    middle = 1 << (form.bits - 1)
    rows, columns = layer.codes.shape
    groups = layer.scale.shape[1]
    on = layer.codes.device
    zeros = torch.full((groups, rows), middle, dtype=torch.int32, device=on)
    return {
        "qweight": packing.pack_gptq(layer.codes.to(torch.int16) + middle, form.bits),
        "qzeros": packing.pack_zeros(zeros, form.bits),
        "scales": layer.scale.T.to(dtype),
        "g_idx": (torch.arange(columns, device=on) // (columns // groups)).to(torch.int32),
    }


def decode(form: Format, tensors: Mapping[str, Tensor]) -> Layer:
    """The layer that `encode` was given."""
    if form.inputs == 8:
        return Layer(tensors["weight"], tensors["weight_scale"])
    codes = packing.unpack_gptq(tensors["qweight"], form.bits).to(torch.int16)
    return Layer((codes - (1 << (form.bits - 1))).to(torch.int8), tensors["scales"].T)


def write_config(
    parent: Path, folder: Path, section: Mapping[str, Any], dtype: torch.dtype
) -> None:
    """The parent's config.json with the quantization's section and the dtype to serve in."""
    config = foreign_json.read(parent / "config.json")
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["quantization_config"] = dict(section)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_companions(parent: Path, folder: Path) -> None:
    """Tokenizer, chat templates, processors, generation configuration and licence travel along."""
    companions.copy(parent, folder)


def read_layers(folder: Path) -> Iterator[tuple[str, Layer]]:
    """Every quantized layer of a checkpoint by module name, unpacked from the written files."""
    for module, _, layer in _layers(folder):
        if layer is not None:
            yield module, layer


def verify(folder: Path, chosen: Mapping[str, str], plan: Plan) -> None:
    """Holds each layer in the files against the digest of what was chosen for it.

    ArtifactError names the first layer that differs, is missing, or was not asked for, or whose
    format config.json does not tell.
    """
    section = _section(folder)
    for name, form in plan.items():
        if (told := artifact.format_of(folder, section, name)) != form:
            raise ArtifactError(f"{folder}: config.json says {told} of {name}, which has {form}")
    missing, modules = dict(chosen), _leaves(folder)
    with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1)) as pool:
        found = pool.map(partial(_digest, folder, section), modules, modules.values())
        for name, digest in zip(modules, found, strict=True):
            if digest is not None and missing.pop(name, None) != digest:
                raise ArtifactError(f"{folder}: {name} does not read back as it was solved")
    if missing:
        raise ArtifactError(f"{folder} lacks the layer {min(missing)}")


def dequantized(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a full-precision model with the artifact's weights, one at a time.

    Names are those of the parent; quantized weights are float32, others as stored.
    """
    for module, tensors, layer in _layers(folder):
        if layer is None:
            yield from ((f"{module}.{leaf}", tensor) for leaf, tensor in tensors.items())
            continue
        yield f"{module}.weight", layer.weight()
        if "bias" in tensors:
            yield f"{module}.bias", tensors["bias"]


def weights(folder: Path, modules: Collection[str]) -> dict[str, Tensor]:
    """The weight that each of these linear layers computes with, float32 [out, in]."""
    found = {
        name: tensors["weight"].float() if layer is None else layer.weight()
        for name, tensors, layer in _layers(folder, modules)
    }
    if missing := set(modules) - found.keys():
        raise ArtifactError(f"{folder} lacks the layer {min(missing)}")
    return found


class Dequantized:
    """The weights that an artifact computes with, by the parent's names, read when asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._section, self._leaves = folder, _section(folder), _leaves(folder)

    def get(self, name: str) -> Tensor:
        """float32 where it is quantized, as stored otherwise. ArtifactError where it is lacking."""
        module, _, leaf = name.rpartition(".")
        tensors, layer = _read(self._folder, self._section, module, self._leaves.get(module, {}))
        if layer is not None and leaf == "weight":
            return layer.weight()
        if leaf not in tensors:
            raise ArtifactError(f"{self._folder} lacks {name}")
        return tensors[leaf]


_MARKS = {"qweight", "weight_scale"}  # who has one of them is quantized
_READERS = 4  # layers that are unpacked at a time


def _section(folder: Path) -> Mapping[str, Any]:
    return artifact.quantization_config(folder) or {}


def _layers(
    folder: Path, only: Collection[str] | None = None
) -> Iterator[tuple[str, dict[str, Tensor], Layer | None]]:
    """Module name, its tensors, and the layer they hold where it is a quantized one."""
    section = _section(folder)
    for module, leaves in _leaves(folder).items():
        if only is None or module in only:
            yield module, *_read(folder, section, module, leaves)


def _digest(
    folder: Path, section: Mapping[str, Any], module: str, leaves: Mapping[str, str]
) -> str | None:
    """Of the layer that a module holds where it is a quantized one."""
    if not _MARKS & leaves.keys():
        return None
    _, layer = _read(folder, section, module, leaves)
    return None if layer is None else layer.digest()


def _read(
    folder: Path, section: Mapping[str, Any], module: str, leaves: Mapping[str, str]
) -> tuple[dict[str, Tensor], Layer | None]:
    """A module's tensors, and the layer they hold where it is a quantized one."""
    interrupt.check()
    tensors = {}
    for leaf, file in leaves.items():
        with safe_open(folder / file, framework="pt") as shard:
            tensors[leaf] = shard.get_tensor(f"{module}.{leaf}")
    if not _MARKS & tensors.keys():
        return tensors, None
    form = artifact.format_of(folder, section, module)
    if form == FULL:
        raise ArtifactError(f"{folder}: config.json says {form} of {module}, which has codes")
    return tensors, decode(form, tensors)


def _leaves(folder: Path) -> dict[str, dict[str, str]]:
    """Of each module its own tensors and the file of each, in name order."""
    modules: dict[str, dict[str, str]] = {}
    for name, header in artifact.headers(folder).items():
        module, _, leaf = name.rpartition(".")
        modules.setdefault(module, {})[leaf] = header.file
    return modules
