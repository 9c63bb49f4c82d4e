"""`quant.proof.bootstrap`: intervals that hold the estimate, shrink with more units, and repeat."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from quant.proof import bootstrap
from quant.proof.evidence import Estimate


def noise(units: int, seed: int = 0) -> Tensor:
    return torch.rand(units, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mean_of(values: Tensor, seed: int = 0) -> Estimate:
    return bootstrap.estimate(bootstrap.draws(len(values), seed) @ values / len(values))


def width(found: Estimate) -> float:
    return found.high - found.low


def test_the_first_row_is_the_sample_and_every_other_one_as_large() -> None:
    counts = bootstrap.draws(7, seed=0)
    assert counts[0].tolist() == [1] * 7
    assert set(counts.sum(1).tolist()) == {7}
    assert counts[1:].max() > 1 and counts[1:].min() == 0


def test_an_interval_holds_its_estimate_and_shrinks_with_more_units() -> None:
    few, many = mean_of(noise(20)), mean_of(noise(2000))
    for found in (few, many):
        assert found.low < found.value < found.high
    assert few.value == pytest.approx(float(noise(20).mean()))
    # As the root of the number of units does, give or take the draw.
    assert width(many) == pytest.approx(width(few) / 10, rel=0.35)


def test_the_interval_of_a_mean_is_what_statistics_says() -> None:
    values = noise(400)
    error = float(values.std()) / 20
    assert width(mean_of(values)) == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_about_nineteen_in_twenty_intervals_hold_the_truth() -> None:
    holds = [found.low <= 0.5 <= found.high for found in (mean_of(noise(60, s)) for s in range(80))]
    assert 0.86 <= sum(holds) / len(holds) <= 1


def test_equal_units_leave_no_doubt() -> None:
    found = mean_of(torch.full((9,), 0.25, dtype=torch.float64))
    assert (found.value, found.low, found.high) == (0.25, 0.25, 0.25)


def test_the_same_seed_gives_the_same_interval() -> None:
    values = noise(30)
    assert mean_of(values, seed=3) == mean_of(values, seed=3) != mean_of(values, seed=4)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_percentile_is_numpys_on_every_resample(share: float) -> None:
    values, unit = noise(60), torch.arange(60) % 12
    counts = bootstrap.draws(12, seed=1)[:20]
    found = bootstrap.percentile(values, unit, counts, share)
    for row, times in enumerate(counts[:, unit].long()):
        drawn = values.repeat_interleave(times).numpy()
        assert found[row] == np.quantile(drawn, share, method="inverted_cdf")
