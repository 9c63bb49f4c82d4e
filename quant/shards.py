"""Safetensors files written whole or not at all, digested on the way, joined where they are small.

A tensor's bytes go into the file from where they lie; safetensors' own writer copies them first,
and cannot join files. Owns the names of a checkpoint's shards and its index. Refuses, with
SpaceError, what the disk cannot hold.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant import artifact, interrupt
from quant.artifact import FileDigest
from quant.durable import settle
from quant.errors import SpaceError
from quant.headers import TensorHeader, read_headers

# Of tensors: an artifact of no more is one file, written a second time at the end. Of a larger one
# each part is a file as it was written, once.
JOINED_BYTES = 1 << 29
HELD_BYTES = 1 << 29  # that a writer collects before it writes a file
_CHUNK = 1 << 22
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_WIDTHS = {name: dtype.itemsize for dtype, name in _NAMES.items()}

Seen = Callable[[memoryview], object]


def _nobody(_piece: memoryview) -> None:
    """Nobody digests what is no part of an artifact."""


@dataclass(frozen=True, slots=True)
class Part:
    """A file of a checkpoint, and the bytes of the tensors in it."""

    file: FileDigest
    tensors: int


def write(path: Path, tensors: Mapping[str, Tensor], seen: Seen = _nobody) -> int:
    """One file of these tensors, on disk for good before it has its name; bytes of the tensors.

    `seen` is called with each of the file's bytes once, in order.
    """
    table = {n: (_NAMES[t.dtype], tuple(t.shape), t.nbytes) for n, t in tensors.items()}
    order = sorted(table, key=lambda name: (-_WIDTHS[table[name][0]], name))
    header = _header([(name, *table[name]) for name in order])
    whole(path, _chain(header, (_raw(tensors[name]) for name in order)), seen)
    return sum(size for *_, size in table.values())


def part(path: Path, tensors: Mapping[str, Tensor]) -> Part:
    """As `write`, with the file's digest, for which nothing is read again."""
    digest = hashlib.sha256()
    size = write(path, tensors, digest.update)
    return Part(FileDigest(sha256=digest.hexdigest(), bytes=path.stat().st_size), size)


def whole(path: Path, pieces: Iterable[Any], seen: Seen = _nobody) -> None:
    """One file of these bytes, on disk for good before it has its name; `seen` as in `write`."""
    growing = path.with_name(f".{path.name}.growing")
    try:
        with growing.open("wb", buffering=0) as out:
            for piece in pieces:
                interrupt.check()
                _put(out, memoryview(piece), seen)
            os.fsync(out.fileno())
        growing.replace(path)
        settle(path.parent)
    except OSError as fault:
        growing.unlink(missing_ok=True)
        raise SpaceError(f"{path.parent} cannot hold {path.name}: {fault.strerror}") from fault


def join(parts: Sequence[Path], path: Path) -> FileDigest | None:
    """One file of all tensors of the parts, which are gone afterwards; its digest.

    May be called again after it was cut short: where the file stands, its digest is not known any
    more and some parts may be missing.
    """
    digest = None
    if not path.exists():
        found = {name: (part, h) for part in parts for name, h in read_headers(part).items()}
        order = sorted(found, key=lambda name: (-_WIDTHS[found[name][1].dtype], name))
        table = [(n, h.dtype, h.shape, h.end - h.begin) for n in order for h in [found[n][1]]]
        pieces = (piece for name in order for piece in _copied(*found[name]))
        taken = hashlib.sha256()
        whole(path, _chain(_header(table), pieces), taken.update)
        digest = FileDigest(sha256=taken.hexdigest(), bytes=path.stat().st_size)
    for part in parts:
        part.unlink(missing_ok=True)
    return digest


def index(folder: Path, names: Iterable[str], total: int) -> None:
    """Says which of these files of a folder holds what; `total` is the bytes of all tensors."""
    found = {tensor: name for name in names for tensor in read_headers(folder / name)}
    content = {"metadata": {"total_size": total}, "weight_map": found}
    whole(folder / artifact.INDEX, [(json.dumps(content, indent=1) + "\n").encode()])


def name(place: int, count: int) -> str:
    """Of the file at a place, from 1 on, of so many."""
    return artifact.SINGLE if count == 1 else f"model-{place:05}-of-{count:05}.safetensors"


def grouped(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Neighbours together while their bytes fit into `limit`."""
    groups: list[list[str]] = []
    room = 0
    for each, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(each)
        room -= size
    return groups


class Writer:
    """Collects tensors into shards of a folder; `close` writes the rest and the index."""

    def __init__(self, folder: Path, held_bytes: int = HELD_BYTES) -> None:
        self._folder, self._limit = folder, held_bytes
        self._held: dict[str, Tensor] = {}
        self._parts: dict[Path, int] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        held = sum(kept.nbytes for kept in self._held.values())
        if self._held and held + tensor.nbytes > self._limit:
            self._flush()
        self._held[name] = tensor.detach().cpu().contiguous()

    def close(self) -> int:
        """Bytes of all tensors."""
        self._flush()
        count = len(self._parts)
        names = [name(place, count) for place in range(1, count + 1)]
        for part, shard in zip(self._parts, names, strict=True):
            part.replace(self._folder / shard)
        total = sum(self._parts.values())
        if count > 1:
            index(self._folder, names, total)
        return total

    def _flush(self) -> None:
        part = self._folder / f"part-{len(self._parts):05}.safetensors"
        self._parts[part] = write(part, self._held)
        self._held = {}


def _copied(part: Path, header: TensorHeader) -> Iterator[bytes]:
    with part.open("rb") as file:
        file.seek(header.begin)
        left = header.end - header.begin
        while left:
            chunk = file.read(min(left, _CHUNK))
            left -= len(chunk)
            yield chunk


def _chain(header: bytes, pieces: Iterable[Any]) -> Iterator[Any]:
    yield header
    yield from pieces


def _header(table: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """Of tensors in file order: name, dtype, shape, bytes. The data starts at a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, dtype, shape, size in table:
        offsets = [place, place := place + size]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _raw(tensor: Tensor) -> Any:
    """The tensor's bytes; in place where they are in order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _put(out: FileIO, piece: memoryview, seen: Seen) -> None:
    while piece.nbytes:
        written = out.write(piece[:_CHUNK])
        seen(piece[:written])
        piece = piece[written:]
        interrupt.check()
