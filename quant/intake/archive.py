"""torch.save's zip archive: `*/data.pkl`, and one uncompressed record per storage.

Knows where each lies in its file, so that a storage is read without the others. Refuses archives
that are damaged, compressed or from a big-endian machine.
"""

from __future__ import annotations

import io
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from quant.errors import SourceError

_LOCAL_HEADER = 30  # bytes before a zip record's name


@dataclass(frozen=True, slots=True)
class Storage:
    begin: int
    held: int
    dtype: torch.dtype


class Window(io.RawIOBase):
    """Part of a file as a file of its own, which is what zipfile needs."""

    def __init__(self, file: BinaryIO, begin: int, length: int) -> None:
        self.file, self.begin, self.length, self._at = file, begin, max(length, 0), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.length}[whence]
        if start + offset < 0:
            raise ValueError("before the first byte")
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.begin + self._at)
        data = self.file.read(min(len(buffer), max(self.length - self._at, 0)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class Archive:
    """torch's zip: where each storage's bytes lie in the file."""

    def __init__(self, path: Path, window: Window) -> None:
        self._path, self._window = path, window
        try:
            self._zip = zipfile.ZipFile(window)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as fault:
            raise SourceError(
                f"{path} is truncated, or not in torch's zip format; copy it anew, or save it again"
                " with torch 1.6 or later"
            ) from fault
        records = {info.filename: info for info in self._zip.infolist()}
        tops = [name.removesuffix("data.pkl") for name in records if name.endswith("/data.pkl")]
        if len(tops) != 1:
            raise SourceError(f"{path} is a zip archive, but none that torch.save wrote")
        self._top, self._records = tops[0], records
        if "byteorder" in self._tail() and self._bytes("byteorder") != b"little":
            raise SourceError(f"{path} was written on a big-endian machine")

    def pickled(self) -> bytes:
        return self._bytes("data.pkl")

    def storage(self, key: str, dtype: torch.dtype, count: int) -> Storage:
        begin, size = self._place(f"data/{key}")
        if count < 0 or count * dtype.itemsize > size:
            raise SourceError(f"{self._path} is corrupt: storage {key} holds {size} bytes")
        return Storage(begin, count, dtype)

    def _tail(self) -> set[str]:
        return {name.removeprefix(self._top) for name in self._records}

    def _bytes(self, name: str) -> bytes:
        begin, size = self._place(name)
        self._window.file.seek(begin)
        return self._window.file.read(size)

    def _place(self, name: str) -> tuple[int, int]:
        """First byte in the file, and size, of a record."""
        info = self._records.get(self._top + name)
        if info is None or info.header_offset < 0:
            raise SourceError(f"{self._path} is corrupt: it has no record {name}")
        self._window.seek(info.header_offset)
        header = self._window.read(_LOCAL_HEADER) or b""
        if info.compress_type != zipfile.ZIP_STORED or len(header) < _LOCAL_HEADER:
            raise SourceError(f"{self._path} is corrupt: record {name} is not stored as it is")
        # The local header's own lengths: torch pads there, so the directory's do not tell.
        names = sum(struct.unpack("<HH", header[26:30]))
        begin = info.header_offset + _LOCAL_HEADER + names
        if begin + info.file_size > self._window.length:
            raise SourceError(f"{self._path} is truncated: record {name} ends after the file")
        return self._window.begin + begin, info.file_size
