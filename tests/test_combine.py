"""Combining changes: against the papers' algorithms written out plainly, and against PEFT's."""

from __future__ import annotations

import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor

from quant.lora import combine

SHAPE = (12, 9)


@pytest.fixture
def changes() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(SHAPE) * (1 + place) for place in range(3)]


def trimmed_at(change: Tensor, density: float) -> float:
    return combine.cutoff(lambda: [change], density)


def test_linear_is_the_weighted_sum(changes: list[Tensor]) -> None:
    weights = [0.5, -1.0, 2.0]
    expected = 0.5 * changes[0] - changes[1] + 2 * changes[2]
    torch.testing.assert_close(combine.linear(changes, weights), expected)


def test_concatenated_factors_are_the_sum_of_the_products() -> None:
    torch.manual_seed(0)
    pairs = [(torch.randn(rank, 9), torch.randn(12, rank)) for rank in (2, 5)]
    expected = 0.5 * pairs[0][1] @ pairs[0][0] - 3 * pairs[1][1] @ pairs[1][0]
    torch.testing.assert_close(combine.concatenated(pairs, [0.5, -3.0]), expected)


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.99, 1.0])
def test_the_cutoff_is_the_kth_magnitude_over_all_tensors(density: float) -> None:
    torch.manual_seed(1)
    parts = [torch.randn(7, 31), torch.randn(300) * 1e-6, torch.zeros(5), -torch.rand(64) * 1e6]
    everything = torch.cat([part.flatten() for part in parts]).abs().sort(descending=True).values
    kept = max(1, round(len(everything) * density))
    assert combine.cutoff(lambda: parts, density) == float(everything[kept - 1])


def test_the_cutoff_of_nothing_keeps_everything() -> None:
    assert combine.cutoff(list, 0.5) == 0.0


def test_ties_is_the_papers_algorithm(changes: list[Tensor]) -> None:
    """Algorithm 1 of 2306.01708, a parameter at a time."""
    density = 0.4
    kept = round(changes[0].numel() * density)
    trimmed = []
    for change in changes:
        least = change.abs().flatten().sort(descending=True).values[kept - 1]
        trimmed.append(torch.where(change.abs() >= least, change, 0))
    expected = torch.zeros(SHAPE)
    for place in [(r, c) for r in range(SHAPE[0]) for c in range(SHAPE[1])]:
        values = [float(change[place]) for change in trimmed]
        sign = 1 if sum(values) > 0 else -1
        agreeing = [value for value in values if value * sign > 0]
        expected[place] = sum(agreeing) / len(agreeing) if agreeing else 0
    ours = combine.ties(changes, [1.0] * 3, [trimmed_at(change, density) for change in changes])
    torch.testing.assert_close(ours, expected)
    assert 0 < (ours != 0).float().mean() < 1


def test_ties_is_pefts_on_one_tensor(changes: list[Tensor]) -> None:
    theirs = merge_utils.ties(changes, torch.ones(3), density=0.5)
    cutoffs = [trimmed_at(change, 0.5) for change in changes]
    torch.testing.assert_close(combine.ties(changes, [1.0] * 3, cutoffs), theirs)


def test_ties_of_one_change_and_no_trimming_is_the_change(changes: list[Tensor]) -> None:
    torch.testing.assert_close(combine.ties(changes[:1], [1.0], [0.0]), changes[0])
    torch.testing.assert_close(combine.ties(changes[:1], [-2.0], [0.0]), -2 * changes[0])


def test_dare_drops_the_rest_and_keeps_the_mean() -> None:
    change = torch.full((400, 500), 3.0)
    thinned = combine.dare(change, 0.1, torch.Generator().manual_seed(0))
    assert set(thinned.flatten().tolist()) == {0.0, 30.0}
    assert (thinned != 0).float().mean() == pytest.approx(0.1, abs=0.005)
    assert thinned.mean() == pytest.approx(3.0, rel=0.05)
    again = combine.dare(change, 0.1, torch.Generator().manual_seed(0))
    other = combine.dare(change, 0.1, torch.Generator().manual_seed(1))
    assert torch.equal(thinned, again) and not torch.equal(thinned, other)
    torch.testing.assert_close(combine.dare(change, 1.0, torch.Generator()), change)
