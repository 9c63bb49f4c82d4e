"""The files of a model's folder, looked at before any of them is used.

Readers pass over what they do not find and wait for ever at a pipe. So a name that means something
in a model's folder is refused where no file is behind it, or only a pointer to one; settings are
held to the kinds of values that loaders and servers take.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from quant import artifact, companions, foreign_json, headers
from quant.errors import SourceError
from quant.intake import around, config_json

_WHOLE = (artifact.SINGLE, artifact.INDEX, "pytorch_model*.bin", "pytorch_model.bin.index.json")
_NAMED = (config_json.FILE, "*.safetensors", *_WHOLE, *companions.ALL)
_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFLNK: "a link to nothing"}
_MOST_BYTES = 16 << 20  # of a file of settings
_NUMBERS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def check(folder: Path) -> None:
    """SourceError for a name that the model's files have, with no file of theirs behind it."""
    for path in sorted(_entries(folder, "", _NAMED)):
        if path.is_dir():
            continue
        if not path.is_file():
            mode = (path.stat() if path.exists() else path.lstat()).st_mode
            what = _KINDS.get(stat.S_IFMT(mode), "a device")
            raise SourceError(f"{path} is {what}: put the file there, or take the name away")
        headers.check_fetched(path, SourceError)
    if (folder / around.ADAPTER).is_file() and any(any(folder.glob(p)) for p in _WHOLE):
        raise SourceError(  # transformers would load both, and the base that the adapter names
            f"{folder} holds a whole model and an adapter ({around.ADAPTER}): move the adapter's"
            " files into a folder of its own and give that as --adapter, or remove them where they"
            " are merged already"
        )


def _entries(folder: Path, inside: str, patterns: Sequence[str]) -> Iterator[Path]:
    """What matches, links to nothing among it, which `Path.glob` passes over."""
    ends = [p.removeprefix(f"{inside}/") for p in patterns if p.rpartition("/")[0] == inside]
    deeper = {p.rpartition("/")[0] for p in patterns if "/" in p} - {inside}
    for path in folder.iterdir():
        if any(fnmatchcase(path.name, end) for end in ends) and not path.name.startswith("."):
            yield path
        for home in deeper if path.is_dir() and not inside else ():
            if fnmatchcase(path.name, home):
                yield from _entries(path, home, patterns)


def check_settings(files: Mapping[str, Path]) -> None:
    """SourceError for a companion, by name, that is no object of settings, or holds odd ones."""
    for name, path in files.items():
        if name.endswith(".json") and not companions.is_vocabulary(name):
            raw = _object(path)
            if name == companions.GENERATION:
                _check_generation(path, raw)


def _object(path: Path) -> dict[str, Any]:
    try:
        raw = foreign_json.read(path, _MOST_BYTES)
    except (OSError, ValueError) as fault:
        raise SourceError(f"{path} cannot be read as JSON: {fault}") from fault
    if not isinstance(raw, dict):
        raise SourceError(f"{path} is not a JSON object")
    return raw


def _check_generation(path: Path, raw: Mapping[str, Any]) -> None:
    """A server takes these for every request that says nothing else, and then fails each."""
    kinds: list[tuple[tuple[str, ...], Callable[[Any], bool], str]] = [
        (_NUMBERS, _is_number, "a finite number"),
        (_IDS, _is_ids, "a token's number, or a list of them"),
    ]
    for names, fits, expected in kinds:
        for name in names:
            if (value := raw.get(name)) is not None and not fits(value):
                raise SourceError(f"{path}: {name} is {value!r:.60}: expected {expected}")
    try:
        GenerationConfig.from_dict(dict(raw)).validate()
    except (ValueError, TypeError, AttributeError, LookupError) as fault:
        reason = " ".join(str(fault).split())[:200]
        raise SourceError(f"{path} is refused by transformers: {reason}") from fault


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_ids(value: Any) -> bool:
    each = value if isinstance(value, list) else [value]
    return all(isinstance(id_, int) and not isinstance(id_, bool) for id_ in each)
