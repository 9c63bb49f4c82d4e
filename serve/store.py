"""Adapter folders taken in: checked against the base, copied under their digest, never changed.

The engine reads an adapter's files again whenever it has dropped it from memory, so it is given a
copy that nobody edits. A folder appears in the store by one rename or not at all.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from quant import artifact
from quant.errors import AdapterError
from quant.lora import adapter
from serve.errors import AdapterRefused

KEPT = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True, slots=True)
class Stored:
    """An adapter in the store; `folder` is named by its digest."""

    digest: str
    folder: Path
    rank: int


@dataclass(frozen=True, slots=True)
class Base:
    """What an adapter must fit: (out, in) by module, the largest rank, the weights' fingerprint."""

    shapes: Mapping[str, tuple[int, int]]
    max_rank: int
    weights: str | None


def base_of(folder: Path, max_rank: int) -> Base:
    """The base that a served folder is; only an artifact of ours knows its fingerprint."""
    manifest = artifact.read(folder)
    weights = manifest.parent.weights if manifest else None
    return Base(artifact.linear_shapes(folder), max_rank, weights)


def take_in(source: Path, base: Base, store: Path) -> Stored:
    """Validate the PEFT folder `source` and copy it into `store`.

    AdapterRefused names the field that differs. Blocking: reads every byte once or twice.
    """
    if not source.is_absolute():
        raise AdapterRefused(f"path {str(source)!r} is not absolute", param="path")
    try:
        found = adapter.read(source)
        adapter.validate(
            found, base.shapes, max_rank=base.max_rank, base_weights_fingerprint=base.weights
        )
    except AdapterError as fault:
        raise AdapterRefused(str(fault), param=fault.field) from fault
    _refuse_non_finite(found.folder / KEPT[1])
    folder = store / found.digest[:12]
    if not folder.is_dir():
        _copy(found.folder, folder)
        if adapter.read(folder).digest != found.digest:
            shutil.rmtree(folder)
            raise AdapterRefused(f"{source} changed while it was read", param="path")
    return Stored(found.digest, folder, found.rank)


def _refuse_non_finite(weights: Path) -> None:
    with safe_open(weights, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a mapping
            if not bool(torch.isfinite(tensors.get_tensor(name)).all()):
                raise AdapterRefused(f"{name} holds NaN or infinity", param=name)


def _copy(source: Path, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
    try:
        for name in KEPT:
            shutil.copyfile(source / name, staging / name)
        os.rename(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
