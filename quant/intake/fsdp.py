"""State dicts of FSDP and of plain torch trainers: sharded folders, and whole `.bin` files.

FSDP, accelerate and torchtitan save a torch.distributed.checkpoint folder; older trainers one
pickled file, or several beside an index. Owns where those lie; names are `quant.intake.naming`'s.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quant import artifact
from quant.errors import ArtifactError, SourceError
from quant.intake import dcp, unpickle
from quant.intake.stored import Checkpoint, Stored, Weight, whole

_INDEX = "pytorch_model.bin.index.json"
_PART = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.(?:bin|pt)$")
_DEPTH = 8  # a pickle may hold a dictionary that contains itself
_SUBFOLDERS = ("pytorch_model_fsdp_*", "model", "pytorch_model")  # accelerate; others


def find_sharded(folder: Path) -> Path | None:
    """The folder with `.metadata`: this one, or the model's in it."""
    if dcp.is_one(folder):
        return folder
    inside = [path for pattern in _SUBFOLDERS for path in sorted(folder.glob(pattern))]
    found = [path for path in inside if dcp.is_one(path)]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise SourceError(f"{folder} holds {names}: give the folder of one model")
    stray = next(iter(sorted(folder.glob("*.distcp"))), None)
    if not found and stray is not None:
        raise SourceError(f"{folder} holds {stray.name} and no {dcp.METADATA}: copy that file too")
    return found[0] if found else None


def read_sharded(folder: Path) -> Checkpoint:
    weights = {name: tensor.weight() for name, tensor in dcp.read(folder).items()}
    return Checkpoint(dcp.files(folder), weights)


def find_whole(folder: Path) -> Path | None:
    return folder if _candidates(folder) else None


def read_whole(folder: Path) -> Checkpoint:
    """One file, or all that the index or the names count."""
    index = _indexed(folder)
    files = _complete(folder, _candidates(folder)) if index is None else _parts(folder, index)
    weights: dict[str, Weight] = {}
    for path in files:
        for name, stored in flat(unpickle.load(path), path):
            if name in weights:
                raise SourceError(f"{path}: {name} is in {weights[name].path.name} too")
            weights[name] = whole(stored)
    if not weights:
        raise SourceError(f"{files[0]} holds no tensors: it is no state dict")
    for name, part in (index or {}).items():
        if name not in weights or weights[name].path.name != part:
            raise SourceError(f"{folder / part} lacks {name}, which {_INDEX} promises")
    return Checkpoint(tuple(files), weights)


def flat(
    content: Any, where: Path, prefix: str = "", depth: int = 0
) -> Iterator[tuple[str, Stored]]:
    """Tensors of nested dictionaries by dotted names; what else lies there is not the model's."""
    if not isinstance(content, dict):
        kind = "one tensor" if isinstance(content, Stored) else f"a {type(content).__name__}"
        raise SourceError(f"{where} holds {kind}: a state dict is expected")
    for key, value in content.items():
        if isinstance(value, Stored):
            yield f"{prefix}{key}", value
        elif isinstance(value, dict) and depth < _DEPTH:
            yield from flat(value, where, f"{prefix}{key}.", depth + 1)


def _candidates(folder: Path) -> list[Path]:
    return sorted((*folder.glob("pytorch_model*.bin"), *folder.glob("pytorch_model*.pt")))


def _complete(folder: Path, found: list[Path]) -> list[Path]:
    parts = [match for path in found if (match := _PART.match(path.name))]
    if not parts:
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise SourceError(f"{folder} holds {names}: leave one of them in it")
        return found
    if len(parts) != len(found) or len({(part[1], part[3]) for part in parts}) > 1:
        raise SourceError(f"{folder} holds parts of more than one model: leave those of one")
    there = {int(part[2]) for part in parts}
    missing = sorted(set(range(1, int(parts[0][3]) + 1)) - there)
    if missing:
        raise SourceError(f"{folder} lacks part {missing[0]} of {int(parts[0][3])}: copy it too")
    return found


def _indexed(folder: Path) -> dict[str, str] | None:
    """The part of each tensor, by the index; None without one."""
    if not (folder / _INDEX).is_file():
        return None
    try:
        return artifact.index(folder / _INDEX, ".bin")
    except ArtifactError as fault:
        raise SourceError(str(fault)) from fault


def _parts(folder: Path, index: Mapping[str, str]) -> list[Path]:
    names = sorted(set(index.values()))
    for name in names:
        if not (folder / name).is_file():
            raise SourceError(f"{folder / name} is missing, and {_INDEX} lists it: copy it too")
    return [folder / name for name in names]
