"""What a run will take, counted from shapes before it starts: multiply-adds, memory, seconds.

Owns the arithmetic of the solver as numbers. Knows a model by the shapes of its linear layers and
the calibration by its size; reads no tensor, and no clock but to see how fast this machine is.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quant import formats
from quant.formats import Shapes

FLOAT = 4  # bytes
_STRIP = 384  # columns beside the diagonal that a Hessian's update computes twice
_PRODUCTS = 12.5  # of a layer's rows with its columns x columns, to solve, improve and judge it
_COPIES = 8  # of a layer's weight that solving it holds at once
_SQUARES = 8  # matrices of columns x columns: two moments of two sets of tokens, and to solve
# What a run takes by its products alone: beside them stand norms, attention's softmax, loops over
# columns, and files. Measured, see DECISIONS.md.
_OVERHEAD = 1.5
_PROBE, _PROBES = 768, 4


@dataclass(frozen=True, slots=True)
class Calibration:
    """`samples` rows of `length` tokens, states of `width` numbers between blocks."""

    samples: int
    length: int
    width: int

    @property
    def tokens(self) -> int:
        return self.samples * self.length

    @property
    def states(self) -> int:
        """Bytes of what goes from one block to the next, of one stream."""
        return self.tokens * self.width * FLOAT


@dataclass(frozen=True, slots=True)
class Unit:
    """Layers of a block that read the same input: `rows` of all of them, `columns` of each."""

    rows: int
    columns: int

    @property
    def weights(self) -> int:
        return self.rows * self.columns


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


def units(shapes: Shapes, prefix: str) -> list[list[Unit]]:
    """The units of each block; `prefix` stands before a block's number.

    Siblings that a server loads as one are taken to read one input.
    """
    blocks: dict[str, list[Unit]] = {}
    for names in formats.siblings(shapes):
        place = names[0].removeprefix(prefix).partition(".")[0]
        rows = sum(shapes[name][0] for name in names)
        blocks.setdefault(place, []).append(Unit(rows, shapes[names[0]][1]))
    return list(blocks.values())


def operations(blocks: Blocks, given: Calibration) -> Operations:
    """Of a whole run. Attention is taken to be as wide as the states, each half of it causal."""
    layers = [unit for block in blocks for unit in block]
    attention = len(blocks) * given.length * given.width
    forwards = 2 * given.tokens * (sum(unit.weights for unit in layers) + attention)
    moments = given.tokens * sum(
        unit.columns * (unit.columns + _STRIP) // 2 + unit.columns**2 for unit in layers
    )
    solving = sum(
        int(_PRODUCTS * unit.rows * unit.columns**2) + unit.columns**3 // 3 for unit in layers
    )
    return Operations(forwards, moments, solving)


def memory(blocks: Blocks, given: Calibration) -> int:
    """Bytes that the largest block takes at its peak, beside the program itself.

    Its weights and a copy of them, the states of both streams, what their forwards hold where they
    stop, and the moments and solution of the layer that takes most.
    """
    return max(_of_block(block, given) for block in blocks)


def seconds(work: int, speed: float) -> float:
    """Of so many multiply-adds, all else counted in; `speed` of them a second."""
    return _OVERHEAD * work / speed


def speed(device: torch.device) -> float:
    """Multiply-adds a second of float32 matrix products here and now: the best of a few."""
    factor = torch.rand(_PROBE, _PROBE, device=device)
    best = 0.0
    for _ in range(_PROBES):
        began = time.perf_counter()
        product = factor @ factor
        float(product[0, 0])  # waits for an accelerator
        best = max(best, _PROBE**3 / (time.perf_counter() - began))
    return best


def _of_block(block: Sequence[Unit], given: Calibration) -> int:
    weights = 2 * FLOAT * sum(unit.weights for unit in block)
    widest = max(unit.columns for unit in block)
    lanes = 2 * given.tokens * (2 * given.width + widest) * FLOAT
    solving = max((_SQUARES * unit.columns**2 + _COPIES * unit.weights) * FLOAT for unit in block)
    return weights + 2 * given.states + lanes + solving
