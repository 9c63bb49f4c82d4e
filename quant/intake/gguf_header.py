"""The header of a GGUF file: its metadata and where its tensors lie. Every count, length and offset
is held against the file before it is believed.

Knows the container alone, not what the keys mean.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from quant.errors import SourceError

_MAGIC, _VERSIONS, _ALIGNMENT = b"GGUF", (2, 3), 32
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}  # fmt: skip
_STRING, _ARRAY = 8, 9
_LONGEST_NAME, _LONGEST_TEXT = 1 << 10, 1 << 24  # bytes
_MOST_ENTRIES = 1 << 24  # of an array: far more than any vocabulary has tokens or merges
_MOST_DIMENSIONS = 4
_LONGEST_LINE = 400


class Place(NamedTuple):
    """A tensor in the file: bytes [begin, begin + size). `shape` is in torch's order: the last
    dimension lies nearest, and is made of whole blocks of `kind`."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    begin: int
    size: int

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])


@dataclass(frozen=True, slots=True)
class Header:
    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Place]

    def refused(self, reason: str) -> SourceError:
        """The one line for a file that is whole and still cannot be used."""
        return SourceError(f"{self.path} cannot be used as a GGUF model: {_line(reason)}")


def read(path: Path) -> Header:
    """All but the tensors' content. SourceError says what is damaged, or of another kind."""
    try:
        with path.open("rb") as file:
            return _Reader(path, file).header()
    except OSError as fault:
        raise SourceError(f"{path} cannot be read as a GGUF model: {fault.strerror}") from fault


class _Reader:
    """Goes once through the header, from its first byte to its last."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file, self._left = path, file, path.stat().st_size

    def header(self) -> Header:
        size = self._left
        if self._bytes(4, "its mark") != _MAGIC:
            raise self._broken("it does not begin with GGUF")
        version = self._number("I")
        if version not in _VERSIONS:
            raise self._broken(f"it is of version {version}, and 2 and 3 are known")
        tensors, keys = self._number("Q"), self._number("Q")
        metadata = self._named(keys, "key", self._value)
        infos = self._named(tensors, "tensor", self._info)
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 20 or alignment % 8:
            raise self._broken(f"general.alignment is {alignment!r}")
        start = math.ceil((size - self._left) / alignment) * alignment
        return Header(self._path, metadata, self._placed(infos, start, size))

    def _named(self, count: int, what: str, value: Callable[[str], Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):  # ends with the file, whatever the count
            name = self._text(_LONGEST_NAME, f"the name of a {what}")
            if name in found:
                raise self._broken(f"it has the {what} {name!r} twice")
            found[name] = value(name)
        return found

    def _value(self, key: str) -> Any:
        kind = self._number("I")
        if kind == _STRING:
            return self._text(_LONGEST_TEXT, key)
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind != _ARRAY:
            raise self._broken(f"{key} has a value of kind {kind}")
        kind, count = self._number("I"), self._number("Q")
        if count > _MOST_ENTRIES:
            raise self._broken(f"{key} has {count} entries, at most {_MOST_ENTRIES}")
        if kind == _STRING:
            return [self._text(_LONGEST_TEXT, key) for _ in range(count)]
        if kind not in _SCALARS:
            raise self._broken(f"{key} is an array of kind {kind}")
        form = struct.Struct(f"<{count}{_SCALARS[kind]}")
        return list(form.unpack(self._bytes(form.size, key)))

    def _info(self, name: str) -> tuple[tuple[int, ...], int, int]:
        count = self._number("I")
        if not 1 <= count <= _MOST_DIMENSIONS:
            raise self._broken(f"{name} has {count} dimensions")
        nearest_first = [self._number("Q") for _ in range(count)]
        return tuple(reversed(nearest_first)), self._number("I"), self._number("Q")

    def _placed(
        self, infos: Mapping[str, tuple[tuple[int, ...], int, int]], start: int, size: int
    ) -> dict[str, Place]:
        found: dict[str, Place] = {}
        end = start
        for name, (shape, kind, offset) in sorted(infos.items(), key=lambda item: item[1][2]):
            if kind not in GGML_QUANT_SIZES:
                raise self._broken(f"{name} is of the unknown type {kind}")
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            if min(shape) < 1 or shape[-1] % block:
                raise self._broken(f"{name} of {list(shape)} is not made of blocks of {block}")
            place = Place(
                shape,
                GGMLQuantizationType(kind),
                start + offset,
                math.prod(shape) // block * block_bytes,
            )
            if place.begin < end:
                raise self._broken(f"{name} overlaps the tensor before it")
            end = place.begin + place.size
            if end > size:
                raise self._broken(f"{name} ends at byte {end} of {size}: download it again")
            found[name] = place
        return found

    def _number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self._bytes(struct.calcsize(f"<{form}"), "a number"))[0]

    def _text(self, longest: int, what: str) -> str:
        length = self._number("Q")
        if length > longest:
            raise self._broken(f"{what} has {length} bytes, at most {longest}")
        try:
            return self._bytes(length, what).decode("utf-8")
        except UnicodeDecodeError as fault:
            raise self._broken(f"{what} is not UTF-8") from fault

    def _bytes(self, count: int, what: str) -> bytes:
        if count > self._left:
            raise self._broken(f"it ends inside {what}: download it again")
        self._left -= count
        return self._file.read(count)

    def _broken(self, reason: str) -> SourceError:
        return SourceError(f"{self._path} cannot be read as a GGUF model: {_line(reason)}")


def _line(reason: str) -> str:
    """Names out of a file may hold anything."""
    line = "".join(mark if mark.isprintable() else "?" for mark in " ".join(reason.split()))
    return line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE - 3]}..."
