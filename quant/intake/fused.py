"""A mixture whose files hold all experts of a block in two tensors, told as the hub stores it.

transformers 5 keeps experts so, and so do the trainers that save what it has in memory. Every
expert's layer is a range of bytes of such a tensor: it gets a header of its own, and whoever reads
by headers never has more than one of them in memory. Refuses tensors of other sizes than
config.json says, and models that are there in both ways.
"""

from __future__ import annotations

import math
from pathlib import Path

from quant import artifact
from quant.errors import SourceError
from quant.headers import Headers, TensorHeader
from quant.intake import architecture, spelling
from quant.intake.spelling import Part


def headers(folder: Path) -> dict[str, TensorHeader]:
    """Every tensor of a model's folder, sorted by the name that the hub has for it.

    ArtifactError for damaged files; SourceError.
    """
    stored = artifact.headers(folder)
    flat = all(len(header.shape) != 3 for header in stored.values())
    # Quantized files have a tensor for each expert, whatever else has three dimensions.
    if flat or artifact.quantization_config(folder) is not None:
        return stored
    return _apart(folder, stored)


def fingerprint(folder: Path) -> str:
    """Of the weights, whichever way the files hold the experts. Reads every byte."""
    return artifact.weights_fingerprint(folder, headers(folder))


def _apart(folder: Path, stored: Headers) -> dict[str, TensorHeader]:
    model = architecture.hollow(architecture.config(folder))
    own = {n: tuple(p.shape) for n, p in model.named_parameters() if p.ndim == 3 and n in stored}
    if not own or spelling.expert_leaves(model) is None:
        return dict(stored)
    for name, shape in own.items():
        if stored[name].shape != shape:
            raise SourceError(
                f"{folder}: {name} is {list(stored[name].shape)}, config.json says {list(shape)}"
            )
    parts = spelling.published(model, {name: header.shape for name, header in stored.items()})
    if both := sorted(name for name, part in parts.items() if name != part.of and name in stored):
        raise SourceError(f"{folder} has {both[0]} and {parts[both[0]].of}: leave one of them")
    return {name: _part(stored[part.of], part) for name, part in sorted(parts.items())}


def _part(header: TensorHeader, part: Part) -> TensorHeader:
    if part.shape == header.shape:
        return header
    row = (header.end - header.begin) // math.prod(header.shape[:-1])  # bytes
    begin = header.begin + part.first * row
    end = begin + part.shape[0] * row
    return TensorHeader(header.dtype, part.shape, header.file, begin, end)
