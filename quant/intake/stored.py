"""A tensor that lies in a file and is read when asked for; nothing is held in between.

Every reader of a trainer's checkpoint hands these on, so that a model is never in memory whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quant import interrupt
from quant.errors import SourceError, brief
from quant.headers import Headers

_PIECE = 1 << 24  # elements
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F4": torch.float4_e2m1fn_x2,
}  # fmt: skip
Range = tuple[Path, int, int]  # bytes [begin, end) of a file


@dataclass(frozen=True, slots=True)
class Stored:
    """A view of a storage: `begin` is the storage's first byte in `path`, `offset` and `stride`
    count elements, `held` is how many of them the storage has."""

    path: Path
    begin: int
    held: int
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def plain(cls, path: Path, begin: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Stored:
        """A whole storage, its last dimension the nearest."""
        stride = tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))
        return cls(path, begin, math.prod(shape), dtype, 0, shape, stride)

    def __post_init__(self) -> None:
        odd = len(self.shape) != len(self.stride) or min(self.shape, default=0) < 0
        if odd or min(self.stride, default=0) < 0 or self.offset < 0:
            layout = brief((self.shape, self.stride))
            raise SourceError(f"{self.path} is corrupt: a tensor of {layout}")
        if self.offset + self.span > self.held:
            raise SourceError(
                f"{self.path} is corrupt: a tensor ends at {self.offset + self.span} of a storage"
                f" of {self.held}"
            )

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def span(self) -> int:
        """Elements of the storage from the first that the view shows to the last."""
        if not self.numel:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))

    def read(self) -> Tensor:
        """In the stored dtype. SourceError where the file ends early."""
        if self.numel > self.held:  # a view of stride 0 asks for memory that no file holds
            raise SourceError(f"{self.path} repeats {self.held} numbers into {list(self.shape)}")
        raw = self._elements(self.offset, self.span)
        return raw.as_strided(self.shape, self.stride).contiguous()

    @property
    def where(self) -> Range:
        """The bytes of its file from the first that it shows to the last."""
        size = self.dtype.itemsize
        begin = self.begin + self.offset * size
        return self.path, begin, begin + self.span * size

    def part(self, first: int, last: int) -> Tensor:
        """Elements [first, last) of a tensor of one dimension."""
        if len(self.shape) != 1 or self.stride != (1,) or not 0 <= first <= last <= self.numel:
            raise SourceError(f"{self.path} is corrupt: no elements {first}:{last} of {self.shape}")
        return self._elements(self.offset + first, last - first)

    def pieces(self) -> Iterator[Tensor]:
        """What `read` gives, flat and in parts of at most `_PIECE` elements."""
        if self != self.plain(self.path, self.begin, self.dtype, self.shape):
            yield from torch.split(self.read().flatten(), _PIECE)
            return
        for first in range(0, self.numel, _PIECE):
            yield self._elements(first, min(_PIECE, self.numel - first))

    def _elements(self, first: int, count: int) -> Tensor:
        made = torch.empty(count, dtype=self.dtype)
        if not count:
            return made
        interrupt.check()
        try:
            with self.path.open("rb") as file:
                file.seek(self.begin + first * self.dtype.itemsize)
                got = file.readinto(made.view(torch.uint8).numpy().data)
        except OSError as fault:
            raise SourceError(f"{self.path} cannot be read: {fault.strerror}") from fault
        if got != made.nbytes:
            raise SourceError(f"{self.path} is truncated: {made.nbytes - got} bytes are missing")
        return made


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of the model, put together by `read` from what `path` and its siblings hold."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    whole: Stored | None = None  # where it lies in one piece

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def pieces(self) -> Iterator[Tensor]:
        """What `read` gives, flat and in parts; little memory where it lies in one piece."""
        if self.whole is not None:
            yield from self.whole.pieces()
        else:
            yield from torch.split(self.read().flatten(), _PIECE)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A trainer's checkpoint: `files` are all that the weights are read from."""

    files: tuple[Path, ...]
    weights: dict[str, Weight]


def whole(stored: Stored) -> Weight:
    """A tensor that lies in one piece."""
    return Weight(stored.path, stored.shape, stored.dtype, stored.read, stored)


def of_headers(folder: Path, headers: Headers) -> dict[str, Weight]:
    """The tensors of safetensors files in `folder`."""
    return {
        name: whole(
            Stored.plain(folder / header.file, header.begin, _DTYPES[header.dtype], header.shape)
        )
        for name, header in headers.items()
    }


def derived(weight: Weight, shape: tuple[int, ...], change: Callable[[Tensor], Tensor]) -> Weight:
    """What `change` makes of a tensor once it is read: one of `shape`, in the same dtype."""
    return Weight(weight.path, shape, weight.dtype, lambda: change(weight.read()))


def overlap(ranges: Iterable[Range]) -> Range | None:
    """One of these ranges that begins inside another; None where no two share a byte."""
    before: Range = (Path(), 0, 0)
    for file, begin, end in sorted(ranges):
        if file == before[0] and begin < before[2]:
            return file, begin, end
        before = file, begin, end
    return None
