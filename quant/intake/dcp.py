"""Folders that torch.distributed.checkpoint writes: `.metadata` and `__N_M.distcp` files.

The metadata is read by the restricted reader, so torch's own reader, which unpickles it, is not
used. A tensor lies in chunks, each one torch.save archive inside a file; a layer of a stack is
read without the others. Refuses chunks that are missing, compressed, outside the folder, or that do
not cover their tensor once.

Layout: torch/distributed/checkpoint/{metadata,filesystem}.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.errors import SourceError, brief
from quant.intake import unpickle
from quant.intake.stored import Stored, Weight, overlap
from quant.intake.unpickle import Inert

METADATA = ".metadata"
_MOST_DIMENSIONS = 8


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
    if len(places) < len(storage):
        raise SourceError(f"{path} is corrupt: it says twice where a part of a tensor lies")
    found = {
        str(name): _sharded(folder, str(name), entry, places)
        for name, entry in tensors.items()
        if isinstance(entry, Inert) and entry.name.endswith(".TensorStorageMetadata")
    }
    chunks = [chunk for tensor in found.values() for chunk in tensor.chunks]
    shared = overlap((chunk.path, chunk.begin, chunk.begin + chunk.length) for chunk in chunks)
    if shared is not None:
        raise SourceError(
            f"{path} is corrupt: two parts lie at byte {shared[1]} of {shared[0].name}"
        )
    return found


def covers_once(
    shape: tuple[int, ...], boxes: Iterable[tuple[tuple[int, ...], tuple[int, ...]]]
) -> bool:
    """Whether boxes of these offsets and sizes fill a tensor of this shape, each number once.

    Every corner of a box counts +1 or -1 by how many of its coordinates are ends. What boxes are in
    sum, point by point, and what these corners are in sum determine each other, so that boxes fill
    the whole once exactly if their corners sum up to those of the whole.
    """
    corners: Counter[tuple[int, ...]] = Counter()
    for sign, offsets, sizes in [(-1, (0,) * len(shape), shape), *((1, *box) for box in boxes)]:
        if min(sizes, default=0) < 0 or not len(offsets) == len(sizes) == len(shape):
            return False
        ends = [first + size for first, size in zip(offsets, sizes, strict=True)]
        for at_end in product((False, True), repeat=len(shape)):
            corner = tuple(
                end if last else first
                for first, end, last in zip(offsets, ends, at_end, strict=True)
            )
            corners[corner] += sign * (-1) ** sum(at_end)
    return not any(corners.values())


def _key(path: Path, index: Any) -> tuple[str, tuple[int, ...] | None]:
    offset = index.get("offset") if isinstance(index, Inert) else None
    name: str = _field(path, index, "fqn", str)
    return name, None if offset is None else _numbers(path, index, "offset")


def _sharded(folder: Path, name: str, entry: Inert, places: Mapping[Any, Any]) -> Sharded:
    path = folder / METADATA
    shape = _numbers(path, entry, "size")
    state = _field(path, entry, "properties", Inert).state
    # TensorProperties pickles itself as a tuple that begins with the dtype.
    dtype = state[0] if isinstance(state, tuple) and state else None
    if not isinstance(dtype, torch.dtype):
        raise SourceError(f"{path} names no dtype for {name}")
    chunks = []
    for chunk in _field(path, entry, "chunks", list):
        offsets, sizes = (_numbers(path, chunk, field) for field in ("offsets", "sizes"))
        if (name, offsets) not in places:
            raise SourceError(f"{path} does not say where {name} at {offsets} lies")
        chunks.append(_chunk(folder, places[name, offsets], offsets, sizes))
    if not covers_once(shape, ((chunk.offsets, chunk.sizes) for chunk in chunks)):
        raise SourceError(
            f"{path} is corrupt: the parts of {name} do not make up {list(shape)}, each number once"
        )
    return Sharded(folder, name, shape, dtype, tuple(chunks))


def _numbers(path: Path, entry: Any, field: str) -> tuple[int, ...]:
    """A field that is a tuple of places or sizes in a tensor."""
    found: tuple[Any, ...] = _field(path, entry, field, tuple)
    if len(found) > _MOST_DIMENSIONS or not all(type(n) is int and 0 <= n < 1 << 63 for n in found):
        raise SourceError(f"{path} is corrupt: {field} of a tensor is {brief(found)}")
    return found


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
        raise SourceError(f"{path} is no checkpoint's metadata: {field} is {brief(value)}")
    return value
