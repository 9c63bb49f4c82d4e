"""What a trainer leaves behind, as a plain model folder: converted once, kept in the cache.

Recognises the kinds in the table below, each owned by its module. Tensors go through one at a time;
numbers that are not finite, and weights that are integers, are refused.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from quant import artifact, companions, interrupt, staging
from quant.errors import SourceError
from quant.intake import architecture, cached, fsdp, megatron, naming, zero
from quant.intake.architecture import Outline
from quant.intake.stored import Checkpoint, Weight
from quant.shards import Writer

FORMAT = 1  # of the converted folders: raise it when the same files would convert differently
_OF_MODEL = ("config.json", companions.GENERATION, *companions.LICENCES)
_OF_TOKENIZER = (*companions.TOKENIZER, *companions.PROCESSORS)
_SUBFOLDERS = ("", "huggingface", "hf", "tokenizer")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CHUNK = 1 << 22
# What reading lets fly over fields of another kind than trainers write.
_UNREADABLE = (AttributeError, LookupError, TypeError, ValueError, OverflowError, RecursionError)
_MARGIN = 32 << 20  # bytes beside the tensors: tokenizer, configuration, headers

Named = Callable[[Mapping[str, Weight], Outline, Path], dict[str, Weight]]


@dataclass(frozen=True, slots=True)
class Kind:
    """`find` says where in a folder a checkpoint lies, if one does; `named` renames its tensors."""

    what: str
    find: Callable[[Path], Path | None]
    read: Callable[[Path], Checkpoint]
    named: Named


KINDS = (
    Kind("Megatron-LM checkpoint", megatron.find, megatron.read, megatron.named),
    Kind("DeepSpeed ZeRO checkpoint", zero.find, zero.read, naming.named),
    Kind("sharded state dict", fsdp.find_sharded, fsdp.read_sharded, naming.named),
    Kind("torch state dict", fsdp.find_whole, fsdp.read_whole, naming.named),
)


def folder(path: Path, cache: Path, say: Callable[[str], None]) -> Path:
    """`path` itself where it holds safetensors, or nothing known; else the converted folder.

    Named by the content of every file it is made of, and the version that converts it.
    SourceError says what is missing or damaged, and what to do.
    """
    if any((path / name).is_file() for name in (artifact.SINGLE, artifact.INDEX)):
        return path
    for kind in KINDS:
        found = kind.find(path)
        if found is not None:
            return _converted(path, found, kind, cache, say)
    return path


def _converted(
    path: Path, found: Path, kind: Kind, cache: Path, say: Callable[[str], None]
) -> Path:
    beside = _companions(path, found, kind)
    config = architecture.config(beside["config.json"].parent)
    say(f"reading the {kind.what} {found.name}")
    checkpoint = _read(found, kind)
    weights = kind.named(checkpoint.weights, architecture.outline(config), found)
    _check_floats(weights)
    digest = _digest((*checkpoint.files, *beside.values()))
    target = cache / "trainer" / f"{path.name}-{digest[:12]}-format-{FORMAT}"
    if not target.is_dir():
        say(f"converting {len(weights)} tensors to safetensors (once; kept in {target.parent})")
        staging.check_space(target.parent, sum(w.bytes for w in weights.values()) + _MARGIN)
    return cached.folder(target, lambda made: _write(made, weights, beside))


def _read(found: Path, kind: Kind) -> Checkpoint:
    try:
        return kind.read(found)
    except _UNREADABLE as fault:
        raise SourceError(
            f"{found} cannot be read as a {kind.what}: {' '.join(repr(fault).split()):.200}; copy"
            " it anew, or take an earlier step"
        ) from fault


def _companions(path: Path, found: Path, kind: Kind) -> dict[str, Path]:
    """What belongs to config.json and to the tokenizer by name, each from the first place that has
    it."""
    homes = (path, found, path.parent)
    places = [home / name for home in homes for name in _SUBFOLDERS]
    config = next((place for place in places if (place / "config.json").is_file()), None)
    if config is None:
        raise SourceError(
            f"{found} is a {kind.what} without a config.json: put the model's into {path}"
        )
    tokenizer = next((p for p in places if companions.found(p, companions.VOCABULARIES)), None)
    if tokenizer is None:
        raise SourceError(
            f"{found} is a {kind.what} without a tokenizer: put tokenizer.json and"
            f" tokenizer_config.json into {path}"
        )
    return _there(config, _OF_MODEL) | _there(tokenizer, _OF_TOKENIZER)


def _there(home: Path, patterns: Sequence[str]) -> dict[str, Path]:
    return {name: home / name for name in companions.found(home, patterns)}


def _check_floats(weights: Mapping[str, Weight]) -> None:
    for name, weight in weights.items():
        if weight.dtype not in _FLOATS:
            dtype = str(weight.dtype).removeprefix("torch.")
            raise SourceError(
                f"{weight.path}: {name} is {dtype}: not full-precision weights. Give the checkpoint"
                " from before it was quantized"
            )


def _digest(files: Iterable[Path]) -> str:
    """sha256 over the names and the bytes of the files."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.parent.name}/{path.name}\n{path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                interrupt.check()
                digest.update(chunk)
    return digest.hexdigest()


def _write(made: Path, weights: Mapping[str, Weight], beside: Mapping[str, Path]) -> None:
    writer = Writer(made)
    for name, weight in weights.items():
        tensor = weight.read()
        assert tuple(tensor.shape) == weight.shape, name
        if not bool(tensor.isfinite().all()):
            raise SourceError(
                f"{weight.path}: {name} holds numbers that are not finite: take an earlier step"
            )
        writer.add(name, tensor)
    writer.close()
    for name, path in beside.items():
        (made / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, made / name)
