"""NF4: the published table follows from its definition, and rounding is to the nearest code."""

from __future__ import annotations

from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from quant.lora import nf4


def quantiles() -> list[float]:
    """Section 3 of the paper: quantiles of N(0, 1), asymmetric around an exact zero."""
    normal, edge = NormalDist(), 0.9677083
    positive = [normal.inv_cdf(edge + (0.5 - edge) * step / 8) for step in range(8)]
    negative = [-normal.inv_cdf(edge + (0.5 - edge) * step / 7) for step in range(7)]
    largest = max(positive)
    return sorted(value / largest for value in (*positive, 0.0, *negative))


def plainly(weight: Tensor) -> Tensor:
    """The same, one number at a time."""
    flat, codes = weight.float().flatten(), torch.tensor(nf4.CODES)
    out = torch.empty_like(flat)
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        largest = block.abs().max()
        for place, value in enumerate(block):
            code = codes[(codes - value / largest).abs().argmin()] if largest else torch.zeros(())
            out[start + place] = code * largest
    return out.view_as(weight)


def test_the_table_is_that_of_the_definition() -> None:
    assert pytest.approx(quantiles(), abs=2e-7) == nf4.CODES


@pytest.mark.parametrize("shape", [(8, 64), (3, 50), (1, 7)])
def test_every_weight_goes_to_the_nearest_code_of_its_block(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    torch.testing.assert_close(nf4.round_trip(weight), plainly(weight))


def test_what_is_in_the_table_stays_and_a_second_trip_changes_nothing() -> None:
    exact = torch.tensor(nf4.CODES).repeat(4, 4) * 0.37
    torch.testing.assert_close(nf4.round_trip(exact), exact)
    once = nf4.round_trip(torch.randn(16, 64))
    torch.testing.assert_close(nf4.round_trip(once), once)


def test_blocks_of_zeros_stay_zeros() -> None:
    weight = torch.zeros(2, 128)
    weight[1] = 1
    assert torch.equal(nf4.round_trip(weight), weight)
    assert torch.equal(nf4.round_trip(weight, double=True)[0], weight[0])


def test_the_dynamic_type_has_256_values_in_order() -> None:
    codes = nf4.dynamic_codes()
    assert len(set(codes.tolist())) == 256 and codes[-1] == 1 and 0 in codes
    assert torch.equal(codes, codes.sort().values)
    # All but 0 and 1 come in pairs, seven powers of ten apart at most.
    assert codes[:-1].min() == pytest.approx(-0.99297, abs=1e-5)
    assert codes[codes > 0].min() == pytest.approx(5.5e-7)


def test_double_quantization_moves_the_maxima_a_little() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 512)
    single, double = nf4.round_trip(weight), nf4.round_trip(weight, double=True)
    ratio = (double / single)[single != 0].reshape(-1)
    assert 0 < (ratio - 1).abs().mean() < 0.01 and (ratio - 1).abs().max() < 0.05
    near, far = (single - weight).square().mean(), (double - weight).square().mean()
    assert near < far < 1.05 * near
