"""Safetensors files written whole or not at all, and joined without being read into memory.

A tensor's bytes go into the file from where they lie; safetensors' own writer copies them first,
and cannot join files. Owns the names of a checkpoint's shards and its index. Refuses, with
SpaceError, what the disk cannot hold.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant import artifact, interrupt
from quant.durable import settle
from quant.errors import SpaceError
from quant.headers import TensorHeader, read_headers

SHARD_BYTES = 4 << 30  # of tensors in one file of an artifact
HELD_BYTES = 1 << 29  # that a writer collects before it writes a file
_CHUNK = 1 << 22
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_WIDTHS = {name: dtype.itemsize for dtype, name in _NAMES.items()}


def write(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """One file of these tensors, on disk for good before it has its name; bytes of the tensors."""
    table = {n: (_NAMES[t.dtype], tuple(t.shape), t.nbytes) for n, t in tensors.items()}
    order = sorted(table, key=lambda name: (-_WIDTHS[table[name][0]], name))
    header = _header([(name, *table[name]) for name in order])
    whole(path, _chain(header, (_raw(tensors[name]) for name in order)))
    return sum(size for *_, size in table.values())


def whole(path: Path, pieces: Iterable[Any]) -> None:
    """One file of these bytes, on disk for good before it has its name."""
    growing = path.with_name(f".{path.name}.growing")
    try:
        with growing.open("wb", buffering=0) as out:
            for piece in pieces:
                interrupt.check()
                _put(out, memoryview(piece))
            os.fsync(out.fileno())
        growing.replace(path)
        settle(path.parent)
    except OSError as fault:
        growing.unlink(missing_ok=True)
        raise SpaceError(f"{path.parent} cannot hold {path.name}: {fault.strerror}") from fault


def assemble(parts: Mapping[Path, int], folder: Path, shard_bytes: int = SHARD_BYTES) -> int:
    """Joins parts, in their order, into a checkpoint in `folder`; bytes of all its tensors.

    `parts` tells the bytes of each one's tensors. They are gone afterwards. May be called again
    after it was cut short: a shard that stands is not made again, and its parts may be missing.
    """
    groups = _grouped(parts, shard_bytes)
    index: dict[str, str] = {}
    for place, group in enumerate(groups, 1):
        name = _name(place, len(groups))
        if not (folder / name).exists():
            _join(group, folder / name)
        for part in group:
            part.unlink(missing_ok=True)
        index |= dict.fromkeys(read_headers(folder / name), name)
    total = sum(parts.values())
    if len(groups) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": index}
        whole(folder / artifact.INDEX, [(json.dumps(content, indent=1) + "\n").encode()])
    return total


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
        return assemble(self._parts, self._folder, shard_bytes=0)

    def _flush(self) -> None:
        part = self._folder / f"part-{len(self._parts):05}.safetensors"
        self._parts[part] = write(part, self._held)
        self._held = {}


def _name(place: int, count: int) -> str:
    return artifact.SINGLE if count == 1 else f"model-{place:05}-of-{count:05}.safetensors"


def _grouped(parts: Mapping[Path, int], limit: int) -> list[list[Path]]:
    """Neighbours together while they fit."""
    groups: list[list[Path]] = []
    room = 0
    for part, size in parts.items():
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(part)
        room -= size
    return groups


def _join(parts: Sequence[Path], path: Path) -> None:
    if len(parts) == 1:
        parts[0].replace(path)
        settle(path.parent)
        return
    found = {name: (part, h) for part in parts for name, h in read_headers(part).items()}
    order = sorted(found, key=lambda name: (-_WIDTHS[found[name][1].dtype], name))
    table = [(n, h.dtype, h.shape, h.end - h.begin) for n in order for h in [found[n][1]]]
    whole(path, _chain(_header(table), (c for name in order for c in _copied(*found[name]))))


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


def _put(out: FileIO, piece: memoryview) -> None:
    while piece.nbytes:
        piece = piece[out.write(piece[:_CHUNK]) :]
        interrupt.check()
