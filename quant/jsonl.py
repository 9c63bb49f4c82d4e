"""JSON records from a user's file, each held against a model; a bad one is named by its number.

One record a line, or all of them in one array, as trainers' data sets have them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pydantic_core
from pydantic import BaseModel, ValidationError

from quant import textfile
from quant.errors import CalibrationError

Line = TypeVar("Line", bound=BaseModel)


def read(file: Path, kind: type[Line]) -> Iterator[tuple[int, Line]]:
    """Every record with its number from 1: of its line, or its place in the file's one array.

    CalibrationError where one is wrong. Blank lines count, and are passed over.
    """
    content = textfile.read(file)
    if content[:64].lstrip().startswith(b"["):
        for number, item in enumerate(_array(file, content), start=1):
            yield number, _held(file, number, kind.model_validate, item)
        return
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            yield number, _held(file, number, kind.model_validate_json, line)


def reason(fault: ValidationError) -> str:
    """The first of what is wrong, and where, on one line."""
    first = fault.errors(include_url=False)[0]
    place = "".join(f"{part}: " for part in first["loc"])
    whole = "; one JSON object on a line is expected" if first["type"] == "json_invalid" else ""
    return place + first["msg"].removeprefix("Value error, ") + whole


def _array(file: Path, content: bytes) -> list[Any]:
    try:
        items = pydantic_core.from_json(content)
    except ValueError as fault:
        raise CalibrationError(f"{file}: malformed array: {fault}") from fault
    assert isinstance(items, list), "it began with a bracket"
    return items


def _held(file: Path, number: int, validate: Callable[[Any], Line], record: Any) -> Line:
    try:
        return validate(record)
    except ValidationError as fault:
        raise CalibrationError(f"{file}:{number}: malformed line: {reason(fault)}") from fault
