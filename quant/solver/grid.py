"""Symmetric grids: which integers a weight may become, and the scale of each group.

Tensors in, tensors out; weights are [rows, columns], a group of them at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Ratios to the scale that just fits the largest weight, by bits: first, last, count. Below one,
# large weights are clipped for the sake of the others; what lies outside never won where measured.
_RATIOS = {4: (0.55, 1.1, 24), 8: (0.92, 1.05, 20)}
FINALISTS = 4  # offered scales that are tried with feedback, of those that round best


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
        """The scale a server will multiply with: as stored, never too small to divide by."""
        info = torch.finfo(self.dtype)
        least = max(info.tiny * info.eps, torch.finfo(torch.float32).tiny)
        return scale.clamp(min=least).to(self.dtype).float()


def full_range(bits: int, dtype: torch.dtype) -> Levels:
    """-8 .. 7 or -128 .. 127: every code of the AutoGPTQ layout."""
    return Levels(-(1 << (bits - 1)), (1 << (bits - 1)) - 1, dtype)


def largest_fits(weights: Tensor, levels: Levels) -> Tensor:
    """Scale [rows] of weights [rows, columns] whose range just holds each row's largest weight.

    A row of zeros gets a scale of one step per unit.
    """
    peak = weights.abs().amax(dim=1)
    steps = (levels.high - levels.low) / 2
    return torch.where(peak > 0, peak / steps, torch.ones_like(peak))


def to_steps(weights: Tensor, scale: Tensor, levels: Levels) -> Tensor:
    """Nearest integers, as floats: [rows, columns] on the grid of scale [rows]."""
    return (weights / scale[:, None]).round_().clamp_(levels.low, levels.high)


def offered(weights: Tensor, levels: Levels) -> Tensor:
    """Stored scales worth trying for weights [rows, columns] of one group: [rows, offered].

    Around the one that just fits; where the range is not symmetric each is offered with both
    signs, for a row whose largest weight is positive is better held by low .. high turned over.
    """
    ratios = torch.linspace(*_RATIOS[levels.bits], device=weights.device)
    scales = levels.stored(largest_fits(weights, levels)[:, None] * ratios)
    if levels.low == -levels.high or levels.bits > 4:
        return scales
    return torch.cat([scales, -scales], dim=1)
