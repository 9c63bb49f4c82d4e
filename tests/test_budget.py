"""`solver.budget`: the best choice there is, never over the budget."""

from __future__ import annotations

import itertools
import random

import pytest

from quant.solver import budget
from quant.solver.budget import Offer

Units = list[list[Offer]]


def drawn(seed: int, count: int, cell: int = 1) -> Units:
    """Units of 1 to 4 offers; larger ones lose less, mostly."""
    draw = random.Random(seed)
    units = []
    for _ in range(count):
        sizes = [cell * draw.randint(3, 40) for _ in range(draw.randint(1, 4))]
        units.append([Offer(size, draw.uniform(0.5, 2) / size) for size in sizes])
    return units


def total(units: Units, chosen: list[int]) -> Offer:
    taken = [offers[place] for offers, place in zip(units, chosen, strict=True)]
    return Offer(sum(o.size for o in taken), sum(o.loss for o in taken))


def by_trying_all(units: Units, limit: int) -> float:
    sums = (total(units, list(c)) for c in itertools.product(*(range(len(u)) for u in units)))
    return min(each.loss for each in sums if each.size <= limit)


def smallest(units: Units) -> int:
    return sum(min(offer.size for offer in offers) for offers in units)


@pytest.mark.parametrize("cell", [1, 4320])
@pytest.mark.parametrize("seed", range(12))
def test_no_other_choice_within_the_budget_loses_less(seed: int, cell: int) -> None:
    units = drawn(seed, 6, cell)
    low, high = smallest(units), sum(max(o.size for o in offers) for offers in units)
    for part in (0.0, 0.2, 0.5, 0.9, 1.0, 1.3):
        limit = low + int(part * (high - low))
        found = total(units, budget.spend(units, limit))
        assert found.size <= limit
        assert found.loss == pytest.approx(by_trying_all(units, limit), rel=1e-12)


def test_sizes_without_a_common_divisor_stay_within_the_budget() -> None:
    draw = random.Random(3)
    units = [[Offer(draw.randint(10**8, 10**9), draw.random()) for _ in range(3)] for _ in range(5)]
    low = smallest(units)
    for part in (1.2, 1.6):
        found = total(units, budget.spend(units, int(part * low)))
        assert found.size <= part * low
        # Each size is rounded up by a 65536th of the range at most.
        worse = by_trying_all(units, int(part * low - 5 * 5 * 10**9 / 65536))
        assert by_trying_all(units, int(part * low)) <= found.loss <= worse


def test_more_to_spend_never_loses_more() -> None:
    units = drawn(7, 30)
    low = smallest(units)
    losses = [total(units, budget.spend(units, low + more)).loss for more in range(0, 300, 10)]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]


def test_an_unbounded_budget_takes_what_loses_least() -> None:
    units = drawn(9, 8)
    for place, offers in zip(budget.spend(units, 10**9), units, strict=True):
        assert offers[place].loss == min(offer.loss for offer in offers)


def test_a_budget_below_the_smallest_is_refused() -> None:
    units = drawn(1, 4)
    assert total(units, budget.spend(units, smallest(units))).size == smallest(units)
    with pytest.raises(ValueError, match=f"below the smallest, {smallest(units)}"):
        budget.spend(units, smallest(units) - 1)
