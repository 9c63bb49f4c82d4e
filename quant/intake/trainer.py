"""What a trainer leaves behind, as a plain model folder: converted once, kept in the cache.

Recognises the kinds in the table below, each owned by its module. Tensors go through one at a time;
numbers that are not finite, and weights that are integers, are refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from quant import artifact, staging
from quant.errors import SourceError
from quant.intake import around, cached, corrected, door, fsdp, megatron, naming, zero
from quant.intake.architecture import Outline
from quant.intake.stored import Checkpoint, Weight

FORMAT = 2  # of the converted folders: raise it when the same files would convert differently
# What reading lets fly over fields of another kind than trainers write.
_UNREADABLE = (AttributeError, LookupError, TypeError, ValueError, OverflowError, RecursionError)

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
    """`path` itself where it holds safetensors; else the converted folder.

    Named by the content of every file it is made of, and the version that converts it.
    SourceError says what is missing or damaged, and what to do.
    """
    if any((path / name).is_file() for name in (artifact.SINGLE, artifact.INDEX)):
        return path
    places = ((kind, kind.find(path)) for kind in KINDS)
    kind, found = next((each for each in places if each[1] is not None), (None, None))
    if kind is None or found is None:
        raise SourceError(around.instead(path))
    return _converted(path, found, kind, cache, say)


def _converted(
    path: Path, found: Path, kind: Kind, cache: Path, say: Callable[[str], None]
) -> Path:
    beside = _companions(path, found, kind)
    say(f"reading the {kind.what} {found.name}")
    checkpoint = _read(found, kind)
    outline = door.outline(beside["config.json"].parent, checkpoint.weights)
    weights = kind.named(checkpoint.weights, outline, found)
    digest = corrected.digest([*checkpoint.files, *beside.values()])
    target = cache / "trainer" / f"{path.name}-{digest[:12]}-format-{FORMAT}"
    if not target.is_dir():
        say(f"converting {len(weights)} tensors to safetensors (once; kept in {target.parent})")
        size = sum(weight.bytes for weight in weights.values())
        staging.check_space(target.parent, size + corrected.MARGIN)
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
    config, tokenizer = around.config_of(path, found), around.tokenizer_of(path, found)
    if not config:
        raise SourceError(
            f"{found} is a {kind.what} without a config.json: put the model's into {path}"
        )
    if not tokenizer:
        raise SourceError(
            f"{found} is a {kind.what} without a tokenizer: put tokenizer.json and"
            f" tokenizer_config.json into {path}"
        )
    return config | tokenizer


def _write(made: Path, weights: Mapping[str, Weight], beside: Mapping[str, Path]) -> None:
    corrected.write(made, weights)
    for name, path in beside.items():
        (made / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, made / name)
