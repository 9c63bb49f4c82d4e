"""What an adapter sits on: a folder, its parent, and what its layers read and put out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from quant import artifact, foreign_json, paths
from quant.artifact import Fingerprint
from quant.errors import ArtifactError
from quant.intake import fused
from quant.lora import adapter as lora


@dataclass(frozen=True, slots=True)
class Base:
    """A folder that adapters sit on. An artifact's parent is what they were trained on."""

    folder: Path
    parent: Fingerprint
    quantized: bool
    merged: tuple[str, ...]  # adapters that are part of its weights already
    artifact: str | None = None  # its identity
    units: Path | None = None  # what its layers read and put out, where not what the parent's do

    @property
    def dtype(self) -> torch.dtype:
        """What config.json says, where that is a 16-bit type; else bfloat16."""
        config = foreign_json.read(self.folder / "config.json")
        named = str(config.get("dtype", config.get("torch_dtype"))).removeprefix("torch.")
        return torch.float16 if named == "float16" else torch.bfloat16


def base_of(folder: Path) -> Base:
    """ArtifactError for a folder that is no model, or that does not say what it was made from."""
    folder = paths.full(folder).resolve()
    if not (folder / "config.json").is_file():
        raise ArtifactError(f"{folder} is not a model folder: it has no config.json")
    manifest = artifact.read(folder)
    if manifest is not None:
        names = tuple(merged.name for merged in manifest.adapters)
        return Base(
            folder,
            manifest.parent,
            quantized=True,
            merged=names,
            artifact=lora.identity(manifest),
            units=lora.units(folder, manifest),
        )
    if artifact.quantization_config(folder) is not None:
        raise ArtifactError(
            f"{folder} is quantized and has no {artifact.MANIFEST} that names its parent: give the"
            " folder it was made from"
        )
    parent = Fingerprint(
        weights=fused.fingerprint(folder),
        tokenizer=artifact.tokenizer_fingerprint(folder),
    )
    return Base(folder, parent, quantized=False, merged=())
