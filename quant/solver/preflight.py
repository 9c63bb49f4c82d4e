"""What a run will take, counted from shapes before it starts: multiply-adds, memory, seconds.

Owns the arithmetic of the solver as numbers. Knows a model by the shapes of its linear layers and
the calibration by its size; reads no tensor, and no clock but to see how fast this machine is.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from quant import formats
from quant.formats import Shapes
from quant.solver.descent import PART
from quant.solver.moments import STRIP

FLOAT = 4  # bytes
_PRODUCTS = 3  # of a layer's rows with its columns x columns, to solve, improve and judge it
_REPEATED = 0.5  # of them once more for every further order of columns
_LOOPS = 4300  # multiply-adds that would take as long as the loops over columns do, a weight
_CHECKS = 2  # of them with what is held out
# Tokens that go through a block together: enough for a full matrix product.
STREAM_TOKENS = {"cpu": 2048, "cuda": 16_384}
# Threads wait for each other's at every layer, two for each stream: never more than so many.
_MOST_STREAMS = 256
HELD = 8  # one in so many calibration tokens is held out, to judge what the others suggest
_SCORES = 4  # copies of an attention's scores that its own code holds at once
_COPIES = 10  # of a part that solving it holds at once
# What a run takes by its products alone at the rate of float32: beside them stand norms,
# attention's softmax, loops over columns, and files. Measured, see DECISIONS.md, but for a GPU that
# is to be exact.
_OVERHEAD = {("cpu", torch.float32): 1.3, ("cpu", torch.bfloat16): 0.75,
             ("cuda", torch.float32): 2.5, ("cuda", torch.bfloat16): 4.6}  # fmt: skip
_LOOSE = {"cpu": 1.25, "cuda": 1.0}  # times what waits: a heap that many forwards share has holes
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_STOPS = 2  # of an expert: before its gate and up projections, and before the other
_PROBE, _PROBES = {"cpu": 768, "cuda": 4096}, 4


class Allowed(NamedTuple):
    """Bytes that a block and what waits may take of a device's memory, and of the host's where that
    is another."""

    device: int
    host: int = 0


ON_CPU = Allowed(3 << 29)  # whatever the machine has: what lies on disk costs little time


class Places(NamedTuple):
    """How many streams wait in the devices' memory, how many in the host's, and how many on disk;
    in that order."""

    device: int
    host: int
    disk: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """`samples` rows of `length` tokens, states of `width` numbers of a `dtype` between blocks, on
    that `kind` of device: so many `devices` share the rows, each `allowed` as much.

    `beside` are bytes of what a stream's blocks get beside the states; `heads` have their scores
    [length, length] held whole, where attention is not fused.
    """

    samples: int
    length: int
    width: int
    dtype: torch.dtype = torch.float32
    kind: str = "cpu"
    allowed: Allowed = ON_CPU
    devices: int = 1
    beside: int = 0
    heads: int = 0

    @property
    def tokens(self) -> int:
        return self.samples * self.length

    @property
    def states(self) -> int:
        """Bytes of what goes from one block to the next, of one stream."""
        return self.tokens * self.width * self.dtype.itemsize

    @property
    def per_stream(self) -> int:
        """Rows that go through a block together."""
        least = math.ceil(self.samples / _MOST_STREAMS)
        return max(1, STREAM_TOKENS[self.kind] // self.length, least)

    @property
    def streams(self) -> int:
        return math.ceil(self.samples / self.per_stream)

    @property
    def given_beside(self) -> int:
        """Bytes of what the blocks of all streams of a device get beside the states."""
        return self.beside * math.ceil(self.streams / self.devices)

    @property
    def threads(self) -> int:
        """That exist at once inside a block, beside OpenMP's for the one that computes."""
        return 2 * self.streams


@dataclass(frozen=True, slots=True)
class Unit:
    """Layers of a block that read the same input: `rows` of all of them, `columns` of each, and the
    `share` of tokens that reach them."""

    rows: int
    columns: int
    share: float = 1.0

    @property
    def weights(self) -> int:
        return self.rows * self.columns

    def adds(self, given: Calibration) -> bool:
        """Whether it puts out what goes from block to block: taken for a layer that adds to it, as
        experts are too, to be on the safe side."""
        return self.rows == given.width


Blocks = Sequence[Sequence[Unit]]


@dataclass(frozen=True, slots=True)
class Operations:
    """Multiply-adds of a run: of both streams, of the moments of inputs, of the solving."""

    forwards: int
    moments: int
    solving: int

    @property
    def total(self) -> int:
        return self.forwards + self.moments + self.solving


def units(shapes: Shapes, experts_per_token: int = 0) -> list[list[Unit]]:
    """The units of each block. Siblings that a server loads as one are taken to read one input;
    of a mixture's experts so many read a token."""
    blocks: dict[str, list[Unit]] = {}
    experts = {found[1] for name in shapes if (found := _EXPERT.search(name))}
    for names in formats.siblings(shapes):
        place = re.split(r"\.(\d+)\.", names[0], maxsplit=1)[1]
        rows = sum(shapes[name][0] for name in names)
        share = experts_per_token / len(experts) if _EXPERT.search(names[0]) else 1.0
        blocks.setdefault(place, []).append(Unit(rows, shapes[names[0]][1], share))
    return list(blocks.values())


def operations(blocks: Blocks, given: Calibration, refine: int = 0) -> Operations:
    """Of a whole run that solves every row `refine` times more. Attention is taken to be as wide as
    the states, each half of it causal."""
    layers = [unit for block in blocks for unit in block]
    attention = len(blocks) * given.length * given.width
    through = sum(unit.share * unit.weights for unit in layers) + attention
    products = sum(
        unit.share
        * (
            unit.columns * (unit.columns + STRIP) // 2  # half of a strip is computed twice
            + min(unit.columns**2, 2 * unit.weights)  # the drift, or what it asks of the outputs
            + unit.adds(given) * unit.weights
        )
        for unit in layers
    )
    solving = sum(_solved(unit, given) + refine * _again(unit) for unit in layers)
    return Operations(int(2 * given.tokens * through), int(given.tokens * products), solving)


def _solved(unit: Unit, given: Calibration) -> int:
    held = min(int(unit.share * given.tokens) // HELD, unit.columns)
    targets = 1 + unit.adds(given)  # a gap's with a factor of its own, the drift's with the solve's
    products = int((_PRODUCTS + targets) * unit.columns) + (_CHECKS + targets) * held
    return unit.weights * products + targets * unit.columns**3 // 3


def _again(unit: Unit) -> int:
    """In another order of columns, beside which the loops over columns count."""
    once = int(_REPEATED * unit.columns) + _LOOPS
    return unit.weights * once + unit.columns**3 // 3


def memory(blocks: Blocks, given: Calibration) -> int:
    """Bytes that the largest block takes at its peak, beside the program itself.

    Its weights and a copy of them in 16 bits, the forward of one batch, what solving takes most,
    and what the forwards hold that wait in the same memory.
    """
    own = math.ceil(places(blocks, given).device / given.devices)
    return _least(blocks, given) + _beside(blocks, given) * own // given.streams


def seconds(work: Operations, speed: float, given: Calibration, forwards: float) -> float:
    """Of so many multiply-adds, all else counted in; `speed` of them a second in float32, and
    `forwards` while a GPU runs blocks and counts moments in what it is made for."""
    factor = _OVERHEAD[given.kind, given.dtype]
    return factor * ((work.total - work.solving) / forwards + work.solving / speed)


def speed(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Multiply-adds a second of matrix products here and now: the best of a few."""
    side, best = _PROBE[device.type], 0.0
    factor = torch.rand(side, side, device=device).to(dtype)
    for _ in range(_PROBES):
        began = time.perf_counter()
        product = factor @ factor
        float(product[0, 0])  # waits for an accelerator
        best = max(best, side**3 / (time.perf_counter() - began))
    return best


def waiting(blocks: Blocks, given: Calibration) -> int:
    """Bytes that the forwards of both streams hold where they stop, between and inside blocks."""
    widest = max(unit.columns for block in blocks for unit in block)
    gap = given.tokens * given.width * FLOAT
    return 2 * given.tokens * (4 * given.width + widest) * given.dtype.itemsize + gap


def places(blocks: Blocks, given: Calibration) -> Places:
    """Where the streams wait: as many as fit beside a block, and those behind them elsewhere."""
    count, allowed = given.streams, given.allowed
    beside = max(allowed.device - _least(blocks, given), 0)
    device = min(given.devices * (beside * count // _beside(blocks, given)), count)
    host = min(allowed.host * count // _shelved(blocks, given), count - device)
    return Places(device, host, count - device - host)


def on_disk(blocks: Blocks, given: Calibration) -> int:
    """Bytes of what lies there at once."""
    return _shelved(blocks, given) * places(blocks, given).disk // given.streams


def _beside(blocks: Blocks, given: Calibration) -> int:
    """Bytes of all streams in a device's memory, with the holes between them."""
    return int(_LOOSE[given.kind] * waiting(blocks, given))


def _shelved(blocks: Blocks, given: Calibration) -> int:
    """Bytes of all streams on a shelf: of a mixture also what each expert put out, until the last
    has."""
    routed = max(sum(u.share for u in block if u.share < 1) for block in blocks) / _STOPS
    return waiting(blocks, given) + int(2 * routed * given.states)


def _least(blocks: Blocks, given: Calibration) -> int:
    """Bytes that the largest block takes where nothing waits beside it."""
    return max(_of_block(block, given) for block in blocks)


def _of_block(block: Sequence[Unit], given: Calibration) -> int:
    weights = (FLOAT + FLOAT // 2) * sum(unit.weights for unit in block)
    widest = max(unit.columns for unit in block)
    together = min(max(STREAM_TOKENS[given.kind], given.per_stream * given.length), given.tokens)
    scores = _SCORES * given.heads * given.length
    batch = together * (8 * given.width + 4 * widest + scores) * FLOAT
    return weights + batch + given.given_beside + max(_solving(unit, given) for unit in block)


def _solving(unit: Unit, given: Calibration) -> int:
    """The Hessian with the drift or its factor, held-out tokens, what is asked of the weight beside
    it, and a part's copies."""
    adds = unit.adds(given)
    kept = 2 * unit.columns + adds * unit.rows
    held = kept * min(given.tokens // HELD, unit.columns)
    part = min(unit.weights, max(PART[given.kind], unit.columns))
    return FLOAT * (2 * unit.columns**2 + held + 2 * (1 + adds) * unit.weights + _COPIES * part)
