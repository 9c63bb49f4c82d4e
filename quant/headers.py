"""The header of one safetensors file, read with the standard library and believed only after
every size in it has been held against the file. Refuses truncated, overlapping and odd files.

Format: https://github.com/huggingface/safetensors#format
"""

import math
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from quant import foreign_json
from quant.errors import ArtifactError, QuantError

# The format's own limit on a header, which keeps a corrupt length from asking for all memory.
MAX_HEADER = 100_000_000
_MOST_DIMENSIONS = 16
_LONGEST_NAME = 1024
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F4": 4, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32,
    "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


# What stands where `git clone` without LFS left a file.
_POINTER = b"version https://git-lfs"


class TensorHeader(NamedTuple):
    """Where a tensor lies: bytes [begin, end) of `file`, a name inside the model's folder."""

    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    end: int


Headers = Mapping[str, TensorHeader]  # by the tensor's name


_Size = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    dtype: Annotated[str, Field(max_length=16)]
    shape: Annotated[list[_Size], Field(max_length=_MOST_DIMENSIONS)]
    data_offsets: Annotated[list[_Size], Field(min_length=2, max_length=2)]


_NAME = TypeAdapter(Annotated[str, Field(max_length=_LONGEST_NAME)])
_TABLE, _METADATA = TypeAdapter(dict[str, Any]), TypeAdapter(dict[str, str])


def read_headers(path: Path, most: int = MAX_HEADER) -> dict[str, TensorHeader]:
    """Every tensor of one file, in file order; `most` bytes of header are read.

    ArtifactError names the file and the fault.
    """
    start, entries = _parse(path, most)
    found: dict[str, TensorHeader] = {}
    place = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        if begin != place or end < begin or min(entry.shape, default=0) < 0:
            raise ArtifactError(f"{path} is corrupt: {name} lies at {begin}, expected {place}")
        if (end - begin) * 8 != math.prod(entry.shape) * _BITS.get(entry.dtype, 0):
            raise ArtifactError(
                f"{path} is corrupt: {name} is {entry.dtype} {entry.shape} in {end - begin} bytes"
            )
        found[name] = TensorHeader(
            entry.dtype, tuple(entry.shape), path.name, start + begin, start + end
        )
        place = end
    size = path.stat().st_size
    if size != start + place:
        kind = "truncated" if size < start + place else "corrupt"
        raise ArtifactError(f"{path} is {kind}: {size} bytes, its header says {start + place}")
    return found


def check_fetched(path: Path, error: type[QuantError]) -> None:
    """`error` where a Git LFS pointer lies in the file's place."""
    with path.open("rb") as file:
        begins = file.read(len(_POINTER))
    if begins == _POINTER:
        raise error(f"{path} is a Git LFS pointer, not the file: run `git lfs pull` in its folder")


def _parse(path: Path, most: int) -> tuple[int, dict[str, _Entry]]:
    """Offset of the data, and the raw entries, every number in them bounded."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe waits for who writes
            raise ArtifactError(f"{path} is no file")
        check_fetched(path, ArtifactError)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= path.stat().st_size - 8:
                raise ArtifactError(f"{path} is truncated or not safetensors (header of {length})")
            if length > most:
                raise ArtifactError(f"{path} has a header of {length} bytes, at most {most}")
            raw = foreign_json.loads(file.read(length))
        if isinstance(raw, dict):
            _METADATA.validate_python(raw.pop("__metadata__", {}))
        # One by one: a table is checked in one go only at the cost of every other thread's time.
        entries = _TABLE.validate_python(raw).items()
        return 8 + length, {
            _NAME.validate_python(name): _Entry.model_validate(entry) for name, entry in entries
        }
    except OSError as fault:
        raise ArtifactError(f"{path} cannot be read: {fault.strerror}") from fault
    except (ValidationError, ValueError, RecursionError) as fault:
        raise ArtifactError(f"{path} is corrupt: its header is not a tensor table") from fault
