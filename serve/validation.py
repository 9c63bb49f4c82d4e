"""What is wrong with a body, in one sentence: of pydantic's list of faults, the one that matters.

pydantic tells of every branch of every union that it tried, by the names of Python types. A segment
of its path is a field of the request where the request itself has it there; the rest is ours to
leave out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from serve.wire import without_tail

_PYTHONS = re.compile(r" or (?:instance of \w+|object to extract fields from)$")
READ = 200  # errors, of as many as a hostile body can make
REASONS = 3  # said of one field, at most
NAMED = 5  # other fields that are named


def explain(errors: Sequence[Any], body: Any) -> tuple[str, str | None]:
    """(message, field) of a RequestValidationError's errors; no field: the whole body."""
    told = [error for error in errors[:READ] if isinstance(error, Mapping)]
    if not told:
        return "; ".join(map(str, errors[:REASONS])) or "the request's body is not valid", None
    for error in told:
        if error.get("type") == "json_invalid":
            return f"the body is not JSON: {error.get('ctx', {}).get('error', 'unreadable')}", None
        fault = (error.get("ctx") or {}).get("error")
        field = getattr(fault, "parameter", None)
        if isinstance(field, str):  # vLLM's own checks name it
            return without_tail(str(fault)), field
    places = [_place(error, body) for error in told]
    counted = Counter(places)
    ((first, _),) = counted.most_common(1)
    reasons = dict.fromkeys(
        _reason(e) for e, place in zip(told, places, strict=True) if place == first
    )
    message = " or ".join(list(reasons)[:REASONS])
    others = [name for place in counted if place != first and (name := _spelled(place))]
    if others and len(told) == len(counted):  # one fault each: other fields, not other branches
        message += f"; also wrong: {', '.join(others[:NAMED])}"
    name = _spelled(first)
    return (f"{name}: {message}" if name else f"the body: {message}"), name or None


def _place(error: Mapping[str, Any], body: Any) -> tuple[str | int, ...]:
    """The path of an error as far as it leads through the request."""
    segments = list(error.get("loc") or ())
    if segments[:1] == ["body"]:
        del segments[0]
    elif segments[:1] and segments[0] in ("query", "path", "header"):
        return tuple(segments[1:])
    lost = segments.pop() if segments and error.get("type") == "missing" else None
    place: list[str | int] = []
    for segment in segments:
        mapped = isinstance(body, Mapping) and segment in body
        listed = isinstance(body, list) and isinstance(segment, int) and segment < len(body)
        if mapped or listed:
            place.append(segment)
            body = body[segment]
    return (*place, lost) if lost is not None else tuple(place)


def _spelled(place: Sequence[str | int]) -> str:
    """`messages[0].content`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return "".join(parts).removeprefix(".")


def _reason(error: Mapping[str, Any]) -> str:
    text = (
        str(error.get("msg", "")).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    )
    if error.get("type") == "missing":
        return "this field is required"
    if error.get("type") == "extra_forbidden":
        return "there is no such field"
    text = _PYTHONS.sub("", text).replace("valid dictionary", "valid object")
    return text[:1].lower() + text[1:]
