"""JSON of unknown origin, parsed in time that grows with its length and no faster.

Refuses numbers of more digits than any tool writes, one name twice in an object, and nesting that
no configuration needs. What the values mean is the reader's business. Standard library only.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MOST_DEPTH = 64
MOST_BYTES = 100_000_000  # of a file; the index of a model of 90,000 tensors has 9 million
_MOST_DIGITS = 100  # of an integer; transformers' `model_max_length` has 31
_MOST_CHARACTERS = 400  # of any other number


def read(path: Path, most: int = MOST_BYTES) -> Any:
    """The value in a file. OSError; ValueError says what is wrong with it."""
    with path.open("rb") as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise ValueError(f"it is longer than the {most} bytes that are read")
    return loads(raw)


def loads(raw: bytes) -> Any:
    """The value that `raw`, in UTF-8, holds. ValueError says what is wrong with it."""
    try:
        value = json.loads(
            raw.decode("utf-8"), parse_int=_integer, parse_float=_float, parse_constant=float,
            object_pairs_hook=_object,
        )  # fmt: skip
    except RecursionError as fault:
        raise ValueError(f"it is nested deeper than {MOST_DEPTH} levels") from fault
    _check_depth(value)
    return value


def _integer(text: str) -> int:
    """Python needs the square of a number's digits to read it."""
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"{text[:8]}... is a number of {len(text)} digits")
    return int(text)


def _float(text: str) -> float:
    if len(text) > _MOST_CHARACTERS:
        raise ValueError(f"{text[:8]}... is a number of {len(text)} characters")
    return float(text)


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Readers differ in which of two they believe."""
    found = dict(pairs)
    if len(found) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name[:100]!r} is there twice")
    return found


def _check_depth(value: Any) -> None:
    """Level by level: what is too deep for us may be too deep for whoever walks it later."""
    level = [value]
    for _ in range(MOST_DEPTH):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inner.extend(v for v in each.values() if isinstance(v, dict | list))
            elif isinstance(each, list):
                inner.extend(v for v in each if isinstance(v, dict | list))
        if not inner:
            return
        level = inner
    raise ValueError(f"it is nested deeper than {MOST_DEPTH} levels")
