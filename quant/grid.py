"""Symmetric grids: which integers a weight may become, and the scale of each group.

Tensors in, tensors out. Works on transposed weights, [columns, rows], so that everything that
happens per output row happens along contiguous memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Ratios to the scale that just fits the largest weight. Below one, large weights are clipped for
# the sake of the others; what lies outside this range never won on the layers measured.
_COARSE = {4: (0.55, 1.05, 9), 8: (0.9, 1.0, 4)}
_FINE_STEPS = 3
# Weights searched at a time on a CPU: they stay in its cache for all candidates, where a whole
# layer would be read from memory for each (measured: four times slower).
_TILE = 1 << 15


@dataclass(frozen=True, slots=True)
class Levels:
    """The integers low .. high, and the dtype that scales are stored in."""

    low: int
    high: int
    dtype: torch.dtype

    @property
    def bits(self) -> int:
        return (self.high - self.low).bit_length()

    def stored(self, scale: Tensor) -> Tensor:
        """The scale a server will multiply with: rounded to the stored dtype, never zero."""
        info = torch.finfo(self.dtype)
        return scale.clamp(min=info.tiny * info.eps).to(self.dtype).float()


def full_range(bits: int, dtype: torch.dtype) -> Levels:
    """-8 .. 7 or -128 .. 127: every code of the AutoGPTQ layout."""
    return Levels(-(1 << (bits - 1)), (1 << (bits - 1)) - 1, dtype)


def largest_fits(columns: Tensor, levels: Levels) -> Tensor:
    """Scale [rows] of weights [columns, rows] whose range just holds each row's largest weight.

    A row of zeros gets a scale of one step per unit.
    """
    peak = columns.abs().amax(dim=0)
    steps = (levels.high - levels.low) / 2
    return torch.where(peak > 0, peak / steps, torch.ones_like(peak))


def to_steps(columns: Tensor, scale: Tensor, levels: Levels) -> Tensor:
    """Nearest integers, as floats: [columns, rows] on the grid of scale [rows]."""
    return (columns / scale).round_().clamp_(levels.low, levels.high)


def search(columns: Tensor, importance: Tensor, levels: Levels) -> Tensor:
    """Stored scale [rows] that minimises sum_j importance_j (w_j - scale * step_j)^2.

    `columns` is [columns, rows], one group; `importance` [columns] is what an error in a column
    costs. A coarse sweep, a fine one around its best, then the least-squares scale of the steps
    found, kept where it is better still (QUANT literature: weighted MSE grids, NeUQI).
    """
    tile = max(1, _TILE // columns.shape[0]) if columns.device.type == "cpu" else columns.shape[1]
    tiles = (part.contiguous() for part in torch.split(columns, tile, dim=1))
    return torch.cat([_search(part, importance, levels) for part in tiles])


def _search(columns: Tensor, importance: Tensor, levels: Levels) -> Tensor:
    widest = largest_fits(columns, levels)
    first, last, count = _COARSE[levels.bits]
    step = (last - first) / (count - 1)
    best = _Best(columns, importance, levels)
    for place in range(count):
        best.offer(widest * (last - place * step))
    centre = best.scale.clone()
    for place in range(1, _FINE_STEPS + 1):
        offset = widest * (step * place / (2 * _FINE_STEPS))
        best.offer(centre + offset)
        best.offer(centre - offset)
    best.offer(_least_squares(columns, importance, best.scale, levels))
    return best.scale


class _Best:
    """The best scale offered so far, per row."""

    def __init__(self, columns: Tensor, importance: Tensor, levels: Levels) -> None:
        self._columns, self._importance, self._levels = columns, importance, levels
        self._steps, self._nearest = torch.empty_like(columns), torch.empty_like(columns)
        self._loss = columns.new_full((columns.shape[1],), torch.inf)
        self.scale = columns.new_ones(columns.shape[1])

    def offer(self, scale: Tensor) -> None:
        # In units of a step, and without a division: this is where a search spends its time.
        scale = self._levels.stored(scale)
        steps = torch.mul(self._columns, scale.reciprocal(), out=self._steps)
        torch.clamp(steps, self._levels.low, self._levels.high, out=self._nearest).round_()
        steps.sub_(self._nearest).square_()
        loss = (self._importance @ steps).mul_(scale.square())
        better = loss < self._loss
        self._loss = torch.where(better, loss, self._loss)
        self.scale = torch.where(better, scale, self.scale)


def _least_squares(columns: Tensor, importance: Tensor, scale: Tensor, levels: Levels) -> Tensor:
    steps = to_steps(columns, scale, levels)
    matched = importance @ (columns * steps)
    energy = importance @ steps.square()
    return torch.where((energy > 0) & (matched > 0), matched / energy, scale)
