"""A JSON file of an adapter's folder, read within limits. Standard library only."""

from pathlib import Path
from typing import Any

from quant import foreign_json
from quant.errors import AdapterError

MAX_JSON = 16 << 20  # bytes


def read_json(path: Path, most: int = MAX_JSON) -> dict[str, Any]:
    """The object in a file; AdapterError where it is missing, too large or no JSON object."""
    if not path.is_file():
        raise AdapterError(f"{path} is missing", field=path.name)
    check_size(path, most)
    try:
        raw = foreign_json.loads(path.read_bytes())
    except ValueError as fault:
        raise AdapterError(f"{path} is not JSON: {fault}", field=path.name) from fault
    if not isinstance(raw, dict):
        raise AdapterError(f"{path} is not a JSON object", field=path.name)
    return raw


def check_size(path: Path, most: int) -> None:
    """AdapterError for a file of more than `most` bytes."""
    if path.stat().st_size > most:
        raise AdapterError(f"{path} is larger than {most} bytes", field=path.name)
