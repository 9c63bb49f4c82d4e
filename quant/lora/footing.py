"""What an adapter sits on: a folder, its parent, and what its layers read and put out.

A model in full precision comes in as `quantize` takes it, by the one door; an artifact as it was
sealed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import PretrainedConfig

from quant import artifact, paths
from quant.artifact import Fingerprint, Manifest
from quant.errors import ArtifactError
from quant.headers import Headers
from quant.intake import architecture, config_json, door, source, stored
from quant.intake.source import Plain, Say
from quant.lora import adapter as lora


@dataclass(frozen=True)
class Base:
    """A folder that adapters sit on. An artifact's parent is what they were trained on.

    `plain` is what the door made of a model in full precision; None of one that is quantized.
    """

    folder: Path
    config: PretrainedConfig
    headers: Headers
    manifest: Manifest | None = None
    plain: Plain | None = None

    @property
    def quantized(self) -> bool:
        return self.plain is None

    @cached_property
    def parent(self) -> Fingerprint:
        """Reads every byte of a model in full precision. ArtifactError where nothing tells."""
        if self.manifest is not None:
            return self.manifest.parent
        if self.plain is None:
            raise ArtifactError(
                f"{self.folder} is quantized and has no {artifact.MANIFEST} that names its parent:"
                " give the folder it was made from"
            )
        return source.fingerprint(self.plain)

    @property
    def merged(self) -> tuple[str, ...]:
        """Adapters that are part of its weights already."""
        return tuple(m.name for m in self.manifest.adapters) if self.manifest else ()

    @property
    def artifact(self) -> str | None:
        """Its identity."""
        return lora.identity(self.manifest) if self.manifest else None

    @property
    def units(self) -> Path | None:
        """What its layers read and put out, where not what the parent's do. AdapterError."""
        return lora.units(self.folder, self.manifest)

    @property
    def dtype(self) -> torch.dtype:
        """What config.json says, where that is a 16-bit type; else bfloat16."""
        return torch.float16 if self.config.dtype == torch.float16 else torch.bfloat16

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module -> (out_features, in_features), as `artifact.linear_shapes`."""
        return artifact.linear_shapes(self.folder, self.headers)


def base_of(given: Path, cache: Path | None = None, say: Say = source.quiet) -> Base:
    """An artifact, or whatever `quantize` takes.

    SourceError, as there; ArtifactError for a damaged artifact.
    """
    folder = paths.full(given)
    manifest = artifact.read(folder)
    if manifest is None and not _is_quantized(folder):
        found = source.plain(str(given), cache, say)
        return Base(found.folder, found.config, found.headers, plain=found)
    folder = folder.resolve()
    return Base(folder, architecture.config(folder), artifact.headers(folder), manifest)


def _is_quantized(folder: Path) -> bool:
    """By another tool: a section of config.json alone does not make it so."""
    files = (artifact.SINGLE, artifact.INDEX)
    if not (folder / config_json.FILE).is_file() or not any((folder / f).is_file() for f in files):
        return False
    if config_json.read(folder).get("quantization_config") is None:
        return False
    return door.quantized(stored.of_headers(folder, artifact.headers(folder))) is not None
