"""config.json as it lies in a folder, held to types and sizes before anything is built from it.

A library that is handed "2" layers, a thousand million of them or a dtype that torch has not ends
somewhere deep inside. Refuses those by key; what the keys mean is `quant.intake.architecture`'s.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quant import foreign_json
from quant.errors import SourceError

FILE = "config.json"
_MOST_BYTES = 16 << 20
_MOST_LAYERS = 4096
_MOST = 1 << 31  # of any width, length or vocabulary
# Keys that count modules, each of which is built; keys that are a size of one.
_COUNTS = re.compile(r"(?:^|_)(?:n|num)_(?:\w+_)?(?:layers?|blocks?|heads?|experts?)$|^depth$")
_SIZES = re.compile(
    r"^(?!.*(?:chunk|window)).*_(?:size|dim|rank)$"
    r"|^(?:max_position_embeddings|n_positions|n_ctx|d_model|n_embd|n_inner|d_ff)$"
)
_NEVER_ZERO = (
    "hidden_size", "vocab_size", "d_model", "n_embd", "head_dim", "num_attention_heads",
    "num_key_value_heads", "n_head", "n_heads", "max_position_embeddings", "n_positions",
)  # fmt: skip
_OBJECTS = (
    "auto_map", "quantization_config", "rope_parameters", "rope_scaling", "text_config",
    "vision_config",
)  # fmt: skip
_DTYPES = ("bfloat16", "float16", "float32", "float64", "half", "float", "double")


def read(folder: Path) -> dict[str, Any]:
    """The object in `folder`'s config.json. SourceError names the key that is of no use."""
    path = folder / FILE
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise SourceError(f"{path} has more than {_MOST_BYTES >> 20} MB: it is no config.json")
        found = foreign_json.loads(path.read_bytes())
    except FileNotFoundError as fault:
        raise SourceError(f"{folder} is not a model folder: it has no {FILE}") from fault
    except (OSError, ValueError) as fault:
        raise SourceError(f"{path} cannot be read as JSON: {fault}") from fault
    if not isinstance(found, dict):
        raise SourceError(f"{path} is not a JSON object")
    for place, key, value in _walked(found, ""):
        if expected := _wrong(place, key, value):
            raise SourceError(f"{path}: {place} is {_short(value)}: expected {expected}")
    return found


def _walked(value: Any, place: str) -> Iterator[tuple[str, str, Any]]:
    """Where each value stands, its key, and itself."""
    inner = value.items() if isinstance(value, dict) else ((str(n), v) for n, v in enumerate(value))
    for key, each in inner:
        at = f"{place}.{key}" if place else str(key)
        yield at, str(key), each
        if isinstance(each, dict | list) and key != "quantization_config":  # whoever reads it knows
            yield from _walked(each, at)


def _wrong(place: str, key: str, value: Any) -> str | None:
    """What was expected of `key`; None where `value` is that."""
    if isinstance(value, float) and (math.isnan(value) or (math.isinf(value) and not _open(key))):
        return "a finite number"
    if value is None:
        return None
    if key in ("dtype", "torch_dtype"):
        fits, expected = (
            isinstance(value, str) and value in _DTYPES,
            'one of "bfloat16", "float16", "float32"; or no such key',
        )
    elif key in _OBJECTS:
        fits, expected = isinstance(value, dict), "an object"
    elif key == "model_type":
        fits, expected = isinstance(value, str), "a text"
    elif key == "rope_theta" or (key == "factor" and "rope" in place):
        fits, expected = isinstance(value, list) or _is_positive(value), "a number above 0"
    elif key.startswith("tie_") and key.endswith("embeddings"):
        fits, expected = isinstance(value, bool), "true or false"
    else:
        return None if isinstance(value, dict | list) else _out_of(_range(key), value)
    return None if fits else expected


def _range(key: str) -> tuple[int, int] | None:
    """The least and the most that a number may be; None where anything may stand."""
    if _COUNTS.search(key):
        return int(key in _NEVER_ZERO), _MOST_LAYERS
    if _SIZES.search(key):
        return int(key in _NEVER_ZERO), _MOST
    return None


def _out_of(limits: tuple[int, int] | None, value: Any) -> str | None:
    if limits is None:
        return None
    least, most = limits
    fits = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
    return None if fits else f"a whole number from {least} to {most}"


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _open(key: str) -> bool:
    """Whether a number may be infinite, as the end of Mamba's `time_step_limit` is."""
    return key.isdigit() or "limit" in key


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
