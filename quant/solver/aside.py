"""Tensors put aside while nobody needs them, in a file that vanishes with the process.

A forward that waits holds what it will go on with, and so do the states between blocks: without
this they would all lie in memory, several times the largest block. Refuses, with SpaceError, what
the disk cannot hold.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple
from weakref import finalize, ref

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quant.errors import SpaceError
from quant.solver import heap

_LEAST = 1 << 18  # bytes that are worth it
_HOLES = 128 << 20  # in the heap; where nothing goes aside there is room for more, and less to win
_here = threading.local()


Pick = Callable[[Tensor], Tensor]


class Place(NamedTuple):
    """Where bytes lie in the file."""

    begin: int
    size: int


class Shelf:
    """The file. A storage is known by where torch keeps it, which stays while the storage does."""

    def __init__(self, file: int, folder: Path) -> None:
        self._file, self._folder, self._end = file, folder, 0
        self._free: dict[int, list[int]] = defaultdict(list)  # begins, by size
        self._storages: dict[int, Place] = {}

    def write(self, tensor: Tensor) -> Place:
        """A copy of a contiguous tensor's numbers."""
        return self._written(tensor.reshape(-1).view(torch.uint8))

    def read(self, place: Place, shape: Sequence[int], *kind: Any) -> Tensor:
        """What was written of a tensor of this shape, dtype and device."""
        made = torch.empty(shape, dtype=kind[0], device=kind[1])
        self._fill(place, made.view(-1).view(torch.uint8))
        return made

    def free(self, place: Place) -> None:
        self._free[place.size].append(place.begin)

    def put(self, storage: UntypedStorage) -> None:
        """Takes a storage's bytes; until it gets them back it has none."""
        self._storages[storage._cdata] = self._written(_bytes(storage))
        storage.resize_(0)

    def take(self, storage: UntypedStorage) -> None:
        """Gives them back."""
        place = self._storages.pop(storage._cdata)
        storage.resize_(place.size)
        self._fill(place, _bytes(storage))
        self.free(place)

    def shown(self, tensor: Tensor) -> Tensor:
        """The tensor, or a copy while its storage's bytes lie here."""
        place = self._storages.get(tensor.untyped_storage()._cdata)
        if place is None:
            return tensor
        held = torch.empty(place.size, dtype=torch.uint8, device=tensor.device)
        self._fill(place, held)
        made = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        layout = tensor.storage_offset(), tensor.shape, tensor.stride()
        return made.set_(held.untyped_storage(), *layout)

    def rows(self, tensor: Tensor, which: Tensor) -> Tensor:
        """`tensor[which]` of a tensor [rows, columns]; read row by row while it lies here."""
        place = self._storages.get(tensor.untyped_storage()._cdata)
        if place is None or not tensor.is_contiguous():
            return self.shown(tensor)[which]
        made = torch.empty(len(which), tensor.shape[1], dtype=tensor.dtype)
        size, view = tensor.shape[1] * tensor.itemsize, _view(made)
        begin = place.begin + tensor.storage_offset() * tensor.itemsize
        for spot, row in enumerate(which.tolist()):
            part = view[spot * size : (spot + 1) * size]
            self._move(_read, Place(begin + row * size, size), part)
        return made.to(tensor.device)

    def _written(self, numbers: Tensor) -> Place:
        free = self._free[numbers.nbytes]
        place = Place(free.pop() if free else self._end, numbers.nbytes)
        self._end = max(self._end, place.begin + place.size)
        self._move(os.pwrite, place, _view(numbers.cpu()))
        return place

    def _fill(self, place: Place, numbers: Tensor) -> None:
        host = numbers if numbers.is_cpu else torch.empty(place.size, dtype=torch.uint8)
        self._move(_read, place, _view(host))
        if host is not numbers:
            numbers.copy_(host)

    def _move(
        self, step: Callable[[int, memoryview, int], int], place: Place, left: memoryview
    ) -> None:
        begin = place.begin
        while left.nbytes:
            try:
                moved = step(self._file, left, begin)
            except OSError as fault:
                reason = f"{self._folder} cannot hold activations: {fault.strerror}"
                raise SpaceError(reason) from fault
            assert moved, "the file ends before what was written"
            begin, left = begin + moved, left[moved:]


@contextmanager
def shelf(folder: Path) -> Iterator[Shelf]:
    """One whose file grows on the disk of `folder`."""
    with TemporaryFile(dir=folder, buffering=0) as file:
        yield Shelf(file.fileno(), folder)


@contextmanager
def hosted() -> Iterator[Shelf]:
    """One whose file lies in the host's memory, for what another device has no room for."""
    file = os.memfd_create("activations")
    try:
        yield Shelf(file, Path("the host's memory"))
    finally:
        os.close(file)


class Kept:
    """A tensor in memory, or, where there is a shelf, on it until it is asked for."""

    def __init__(self, tensor: Tensor, shelf: Shelf | None) -> None:
        self.tensor: Callable[[], Tensor] = lambda: tensor
        if shelf is None:
            return
        place, like = shelf.write(tensor), (tensor.shape, tensor.dtype, tensor.device)
        self.tensor = lambda: shelf.read(place, *like)
        finalize(self, shelf.free, place)


@dataclass(frozen=True, slots=True)
class Pair:
    """Inputs of a layer when served and in the parent, and what the stream it adds to `lacks`,
    shown when asked for; `picks` take the tokens that count out of each."""

    shelf: Shelf
    tensors: tuple[Tensor, Tensor]
    picks: tuple[Pick, Pick]
    routed: Tensor | None
    lacks: Callable[[], Tensor | None]

    @property
    def served(self) -> Tensor:
        return self.picks[0](self.shelf.shown(self.tensors[0]))

    @property
    def parent(self) -> Tensor:
        return self.picks[1](self.shelf.shown(self.tensors[1]))

    @property
    def gap(self) -> Tensor | None:
        states = self.lacks()
        return None if states is None else self.picks[0](states)


class Holdings(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's, on subclassing
    """What the forward under it has made and still holds, however deep in whose code."""

    def __init__(self, shelf: Shelf) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's
        self.shelf = shelf
        self._made: dict[int, list[ref[Tensor]]] = {}  # tensors by their storage

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            key = _storage(tensor)
            if key not in given:  # fresh, though another storage may have been there before
                self._made[key] = [ref(tensor)]
            elif self._alive(key) is not None:  # a view of what was made here; a weight's is none
                self._made[key].append(ref(tensor))
        return out

    @contextmanager
    def aside(self, *needed: Tensor) -> Iterator[None]:
        """Puts all of it but what is `needed` on the shelf meanwhile, unless it lies there."""
        alive = {key: tensor for key in self._made if (tensor := self._alive(key)) is not None}
        self._made = {key: [r for r in self._made[key] if r() is not None] for key in alive}
        kept = {_storage(tensor) for tensor in needed}
        held = [tensor.untyped_storage() for key, tensor in alive.items() if key not in kept]
        del alive
        large = [storage for storage in held if storage.nbytes() >= max(_LEAST, 1)]
        for storage in large:
            self.shelf.put(storage)
        yield
        for storage in large:
            self.shelf.take(storage)

    def _alive(self, key: int) -> Tensor | None:
        """A tensor that has this storage, if one that was made here still does."""
        found = (made() for made in self._made.get(key, ()))
        return next((tensor for tensor in found if tensor is not None), None)


@contextmanager
def holding(shelf: Shelf | None) -> Iterator[None]:
    """What this thread makes in there goes on the shelf when it is put `away`."""
    if shelf is None:
        yield
        return
    with Holdings(shelf) as _here.held:
        try:
            yield
        finally:
            _here.held = None


@contextmanager
def away(*needed: Tensor) -> Iterator[Shelf | None]:
    """Puts what this thread holds on its shelf meanwhile, but what is `needed`; the shelf, or
    None where it has none and all stays in memory."""
    held: Holdings | None = getattr(_here, "held", None)
    with held.aside(*needed) if held else nullcontext():
        heap.keep_low(_HOLES if held else 4 * _HOLES)
        yield held.shelf if held else None


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _read(file: int, part: memoryview, begin: int) -> int:
    return os.preadv(file, [part], begin)


def _view(numbers: Tensor) -> memoryview:
    """Of bytes on the host. A storage that numpy has seen would not be resized any more."""
    return memoryview((ctypes.c_ubyte * numbers.nbytes).from_address(numbers.data_ptr()))


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
