"""Paired bootstrap: how far a figure would move with other windows, or other questions.

Resamples whole units, since tokens of one window are not independent, and both models on the same
units, so that what moves them together cancels. Tensors in, estimates out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.proof.evidence import Estimate

_DRAWS = 1000
_TAIL = 0.025  # of the resamples on each side of a 95% interval


def draws(units: int, seed: int) -> Tensor:
    """How often each unit is in each resample, float64 [1 + draws, units].

    The first row is the sample itself, each unit once.
    """
    picked = torch.randint(
        units, (_DRAWS, units), generator=torch.Generator().manual_seed(seed), dtype=torch.int64
    )
    counts = torch.zeros(1 + _DRAWS, units, dtype=torch.float64)
    counts[0] = 1
    counts[1:].scatter_add_(1, picked, torch.ones(picked.shape, dtype=torch.float64))
    return counts


def estimate(figures: Tensor) -> Estimate:
    """From a figure of every row of `draws`, [1 + draws]."""
    low, high = torch.quantile(figures[1:], torch.tensor([_TAIL, 1 - _TAIL], dtype=figures.dtype))
    return Estimate(value=float(figures[0]), low=float(low), high=float(high))


def percentile(values: Tensor, unit: Tensor, counts: Tensor, share: float) -> Tensor:
    """The least value that `share` of the values do not exceed, for each row of `counts`.

    `values` and the number of each one's unit are [tokens]; the result is [rows].
    """
    ordered, order = values.sort()
    units = unit[order]
    found = torch.empty(len(counts), dtype=values.dtype)
    for place, times in enumerate(counts):  # row by row: [rows, tokens] may not fit
        reached = times[units].cumsum(0)
        found[place] = ordered[torch.searchsorted(reached, share * reached[-1])]
    return found
