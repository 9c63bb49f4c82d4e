"""Several changes to one tensor made one: linear, concatenation, TIES, DARE. Tensors in and out.

Task vectors here are full weight changes in float32, as the papers have them: TIES-Merging (Yadav
et al., arXiv 2306.01708), DARE (Yu et al., arXiv 2311.03099). Merging A and B apart, as is common
for LoRA, gives cross terms B1 A2 that no adapter learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

_BINS = 1 << 16


def linear(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum."""
    total = torch.zeros_like(changes[0])
    for change, weight in zip(changes, weights, strict=True):
        total.add_(change, alpha=weight)
    return total


def concatenated(pairs: Sequence[tuple[Tensor, Tensor]], factors: Sequence[float]) -> Tensor:
    """[f1 B1 | f2 B2 ...] [A1; A2; ...] from pairs A [rank, in], B [out, rank]: ranks add up."""
    wide = torch.cat([f * b for (_, b), f in zip(pairs, factors, strict=True)], dim=1)
    return wide @ torch.cat([a for a, _ in pairs])


def ties(changes: Sequence[Tensor], weights: Sequence[float], cutoffs: Sequence[float]) -> Tensor:
    """Trim, elect a sign, average what agrees.

    `cutoffs` are the magnitudes that each change is trimmed at, see `cutoff`. The sign of a
    parameter is that of the weighted sum of what is left; the result is the weighted sum of the
    changes of that sign over their number (the paper has equal weights, and scales afterwards).
    """
    kept = [torch.where(c.abs() >= least, c, 0) for c, least in zip(changes, cutoffs, strict=True)]
    elected = linear(kept, weights).sign()
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for change, weight in zip(kept, weights, strict=True):
        # A negative weight turns a task vector around before it votes.
        agrees = ((change * weight).sign() == elected) & (change != 0)
        total.add_(torch.where(agrees, change, 0), alpha=weight)
        count.add_(agrees)
    return total / count.clamp_min_(1)


def dare(change: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Drops each number with probability 1 - density and divides the others by density."""
    keep = torch.rand(change.shape, generator=generator) < density
    return torch.where(keep, change / density, 0)


def cutoff(changes: Callable[[], Iterable[Tensor]], density: float) -> float:
    """The magnitude of the k-th largest number of a task vector, k its size times `density`.

    Exact over all tensors together without holding them: a non-negative float32 sorts as its bits,
    so one pass counts the upper half of the bits, and a second the lower half within the right bin.
    `changes` is called twice and gives the vector's tensors one at a time.
    """
    upper = _histogram(bits >> 16 for bits in _bits(changes))
    size = int(upper.sum())
    if not size:
        return 0.0
    high, left = _descend(upper, max(1, round(size * density)))
    lower = _histogram(bits[bits >> 16 == high] & 0xFFFF for bits in _bits(changes))
    low, _ = _descend(lower, left)
    return float(torch.tensor(high << 16 | low, dtype=torch.int32).view(torch.float32))


def _bits(changes: Callable[[], Iterable[Tensor]]) -> Iterable[Tensor]:
    return (change.abs().reshape(-1).view(torch.int32) for change in changes())


def _histogram(values: Iterable[Tensor]) -> Tensor:
    counts = torch.zeros(_BINS, dtype=torch.int64)
    for value in values:
        counts += torch.bincount(value, minlength=_BINS)
    return counts


def _descend(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bin that holds the `wanted`-th value from the top, and its place within that bin."""
    above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, wanted))
    before = int(above[place - 1]) if place else 0
    return _BINS - 1 - place, wanted - before
