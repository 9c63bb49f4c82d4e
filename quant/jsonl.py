"""JSON lines from a user's file, each held against a model; a malformed one is named by number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from quant.errors import CalibrationError

Line = TypeVar("Line", bound=BaseModel)


def read(file: Path, kind: type[Line]) -> Iterator[tuple[int, Line]]:
    """Every line that is not blank, with its number from 1. CalibrationError where one is wrong."""
    try:
        lines = file.read_bytes().splitlines()
    except OSError as fault:
        raise CalibrationError(f"{file} cannot be read: {fault.strerror}") from fault
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, kind.model_validate_json(line)
        except ValidationError as fault:
            first = fault.errors(include_url=False)[0]
            place = "".join(f"{part}: " for part in first["loc"])
            raise CalibrationError(
                f"{file}:{number}: malformed line: {place}{first['msg']}"
            ) from fault
