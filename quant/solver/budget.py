"""Which of the offered sizes each unit gets, so that the whole loses least within a budget.

A multiple-choice knapsack. Numbers in, numbers out: knows nothing of layers or formats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_MOST_CELLS = 1 << 16  # the budget in steps of the sizes' common divisor, coarser beyond this


class Offer(NamedTuple):
    """What a unit may be had for: bytes, and what the model loses by it."""

    size: int
    loss: float


def spend(units: Sequence[Sequence[Offer]], budget: int) -> list[int]:
    """The place of the chosen offer in each unit: least total loss of at most `budget` bytes.

    By dynamic programming over what is spent beyond the smallest offers. Exact where the offers'
    sizes differ by multiples of a common cell (the layers of a transformer do); where that is
    finer than a part in `_MOST_CELLS`, sizes are rounded up to it. ValueError for a budget below
    the smallest offers.
    """
    least = [min(offer.size for offer in offers) for offers in units]
    room = budget - sum(least)
    if room < 0:
        raise ValueError(f"a budget of {budget} bytes is below the smallest, {sum(least)}")
    beyond = [[offer.size - low for offer in unit] for unit, low in zip(units, least, strict=True)]
    most = sum(map(max, beyond))
    room = min(room, most)
    cell = max(math.gcd(*(extra for unit in beyond for extra in unit)), -(-most // _MOST_CELLS), 1)
    cells = room // cell + 1
    lost = np.zeros(cells)  # by the units so far, when at most that much is spent
    picks = np.empty((len(units), cells), dtype=np.uint8)
    for place, (offers, extras) in enumerate(zip(units, beyond, strict=True)):
        tried = np.full((len(offers), cells), np.inf)
        for row, offer, extra in zip(tried, offers, extras, strict=True):
            cost = -(-extra // cell)
            if cost < cells:
                row[cost:] = lost[: cells - cost] + offer.loss
        picks[place] = tried.argmin(axis=0)
        lost = tried.min(axis=0)
    chosen: list[int] = []
    left = cells - 1
    for place in reversed(range(len(units))):
        chosen.append(int(picks[place, left]))
        left -= -(-beyond[place][chosen[-1]] // cell)
    return chosen[::-1]
