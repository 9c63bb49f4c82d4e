"""Folders that torch.distributed.checkpoint writes: `.metadata` and `__N_M.distcp` files.

The metadata is read by the restricted reader, so torch's own reader, which unpickles it, is not
used. A tensor lies in chunks, each one torch.save archive inside a file; a layer of a stack is
read without the others. Refuses chunks that are missing, compressed, or outside the folder.

Layout: torch/distributed/checkpoint/{metadata,filesystem}.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.errors import SourceError
from quant.intake import unpickle
from quant.intake.stored import Stored, Weight
from quant.intake.unpickle import Inert

METADATA = ".metadata"


@dataclass(frozen=True, slots=True)
class Chunk:
    """Part of a tensor: where it starts in it, its size, and its bytes in a file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    begin: int
    length: int

    def read(self, dtype: torch.dtype) -> Tensor:
        stored = unpickle.load(self.path, self.begin, self.length)
        if not isinstance(stored, Stored) or stored.numel != math.prod(self.sizes):
            raise SourceError(f"{self.path} is corrupt: no {list(self.sizes)} at byte {self.begin}")
        if stored.dtype != dtype:
            raise SourceError(f"{self.path} is corrupt: {stored.dtype}, {METADATA} says {dtype}")
        return stored.read().reshape(self.sizes)


@dataclass(frozen=True, slots=True)
class Sharded:
    """A tensor in chunks that together cover it once."""

    folder: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]

    def weight(self) -> Weight:
        return Weight(self.folder, self.shape, self.dtype, partial(self._read, self.chunks))

    def row(self, place: int) -> Weight:
        """One of the tensors that this one stacks in its first dimension."""
        chunks = [c for c in self.chunks if 0 <= place - c.offsets[0] < c.sizes[0]]
        read = partial(self._row, chunks, place)
        return Weight(self.folder, self.shape[1:], self.dtype, read)

    def _read(self, chunks: Sequence[Chunk]) -> Tensor:
        made = torch.empty(self.shape, dtype=self.dtype)
        for chunk in chunks:
            _window(made, chunk.offsets, chunk.sizes).copy_(chunk.read(self.dtype))
        return made

    def _row(self, chunks: Sequence[Chunk], place: int) -> Tensor:
        made = torch.empty(self.shape[1:], dtype=self.dtype)
        for chunk in chunks:
            part = chunk.read(self.dtype)[place - chunk.offsets[0]]
            _window(made, chunk.offsets[1:], chunk.sizes[1:]).copy_(part)
        return made


def is_one(folder: Path) -> bool:
    return (folder / METADATA).is_file()


def files(folder: Path) -> tuple[Path, ...]:
    """All that a checkpoint's tensors are read from."""
    return folder / METADATA, *sorted(folder.glob("*.distcp"))


def read(folder: Path) -> dict[str, Sharded]:
    """Every tensor by its name; other objects are left unread. SourceError names what lacks."""
    path = folder / METADATA
    metadata = unpickle.load_bare(path)
    tensors = _field(path, metadata, "state_dict_metadata", dict)
    storage = _field(path, metadata, "storage_data", dict)
    places = {_key(path, index): info for index, info in storage.items()}
    return {
        str(name): _sharded(folder, str(name), entry, places)
        for name, entry in tensors.items()
        if isinstance(entry, Inert) and entry.name.endswith(".TensorStorageMetadata")
    }


def _key(path: Path, index: Any) -> tuple[str, tuple[int, ...] | None]:
    offset = index.get("offset") if isinstance(index, Inert) else None
    return _field(path, index, "fqn", str), None if offset is None else tuple(offset)


def _sharded(folder: Path, name: str, entry: Inert, places: Mapping[Any, Any]) -> Sharded:
    path = folder / METADATA
    shape = tuple(_field(path, entry, "size", tuple))
    state = _field(path, entry, "properties", Inert).state
    # TensorProperties pickles itself as a tuple that begins with the dtype.
    dtype = state[0] if isinstance(state, tuple) and state else None
    if not isinstance(dtype, torch.dtype):
        raise SourceError(f"{path} names no dtype for {name}")
    chunks = []
    for chunk in _field(path, entry, "chunks", list):
        offsets = tuple(_field(path, chunk, "offsets", tuple))
        sizes = tuple(_field(path, chunk, "sizes", tuple))
        ends = [first + size for first, size in zip(offsets, sizes, strict=False)]
        if not len(offsets) == len(sizes) == len(shape) or any(map(_beyond, ends, shape)):
            raise SourceError(f"{path} is corrupt: {name} {list(shape)} has a part at {offsets}")
        if (name, offsets) not in places:
            raise SourceError(f"{path} does not say where {name} at {offsets} lies")
        chunks.append(_chunk(folder, places[name, offsets], offsets, sizes))
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
        raise SourceError(f"{path}: the parts of {name} do not make up {list(shape)}")
    return Sharded(folder, name, shape, dtype, tuple(chunks))


def _beyond(end: int, size: int) -> bool:
    return end > size


def _chunk(folder: Path, info: Any, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Chunk:
    metadata = folder / METADATA
    file = _field(metadata, info, "relative_path", str)
    begin = _field(metadata, info, "offset", int)
    length = _field(metadata, info, "length", int)
    if info.get("transform_descriptors"):
        raise SourceError(f"{metadata}: {file} is compressed: save the checkpoint without that")
    if math.prod(sizes) > length:  # a byte each at least: no memory is asked for on a lie
        raise SourceError(f"{metadata} is corrupt: {list(sizes)} in {length} bytes of {file!r:.80}")
    if Path(file).name != file or min(begin, length) < 0:
        raise SourceError(f"{metadata} points outside its folder: {file!r:.80}")
    path = folder / file
    if not path.is_file():
        raise SourceError(f"{path} is missing, and {metadata} lists it: copy every rank's files")
    if path.stat().st_size < begin + length:
        raise SourceError(f"{path} is truncated: {path.stat().st_size} bytes of {begin + length}")
    return Chunk(offsets, sizes, path, begin, length)


def _window(whole: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        whole = whole.narrow(dim, offset, size)
    return whole


def _field(path: Path, entry: Any, field: str, kind: type) -> Any:
    value = entry.get(field) if isinstance(entry, Inert) else None
    if not isinstance(value, kind):
        raise SourceError(f"{path} is no checkpoint's metadata: {field} is {value!r:.60}")
    return value
