"""`solver.moments`: means that are what they say, and tokens that tell the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant.errors import SolveError
from quant.solver import gptq
from quant.solver.moments import Hessian, Moments, Sample, energy, held_out, merged
from tests.test_gptq import correlated, drawn, hessian_of

pytestmark = pytest.mark.arithmetic

ROWS, COLUMNS = 24, 64
CPU = torch.device("cpu")


def moments(served: Tensor, parent: Tensor | None = None, weight: Tensor | None = None) -> Moments:
    """Of a layer's inputs; the layer itself matters only to what a drift asks of it."""
    found = Moments(torch.eye(served.shape[1]) if weight is None else weight)
    found.add(served, served if parent is None else parent)
    return found


def drifted(tokens: int, seed: int = 0, size: float = 0.3) -> tuple[Tensor, Tensor]:
    """Inputs as served and the parent's: off by a little noise, and by a fixed mixing."""
    parent = correlated(tokens, COLUMNS, seed)
    mixing = drawn(COLUMNS, COLUMNS, seed=99) / COLUMNS**0.5
    noise = drawn(tokens, COLUMNS, seed=seed + 7)
    return parent + size * (parent @ mixing + noise), parent


@pytest.mark.parametrize("columns", [64, 384, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_hessian_is_the_mean_outer_product_of_what_was_added(
    columns: int, dtype: torch.dtype
) -> None:
    inputs = drawn(50, columns).to(dtype)
    hessian = Hessian(columns)
    for part in torch.split(inputs, [20, 1, 29]):
        hessian.add(part)
    exact = inputs.double().T @ inputs.double() / 50
    mean = hessian.mean()
    assert hessian.tokens == 50 and torch.equal(mean, mean.T)
    assert float((mean.double() - exact).abs().max()) < 1e-6 * float(exact.diagonal().max())


@pytest.mark.parametrize("columns", [64, 384, 1000])
def test_half_of_a_symmetric_matrix_tells_what_rows_lose(columns: int) -> None:
    rows, hessian = drawn(ROWS, columns), hessian_of(drawn(50, columns, seed=1))
    expected = ((rows.double() @ hessian.double()) * rows).sum(dim=1)
    torch.testing.assert_close(energy(rows, hessian).double(), expected, rtol=1e-4, atol=0)
    assert torch.equal(rows, drawn(ROWS, columns))


def test_inputs_that_are_mostly_alike_need_no_more_damping_in_sixteen_bits() -> None:
    """What attention puts out often is: its sums, rounded, would hide what differs."""
    inputs = (30 * drawn(1, 384) + drawn(2000, 384, seed=1)).bfloat16()
    hessian = Hessian(384)
    for part in torch.split(inputs, 1000):
        hessian.add(part)
    assert gptq.factorize(hessian.mean(), 1e-3, 32).damping == 1e-3
    rounded = torch.stack([(part.T @ part).float() for part in torch.split(inputs, 1000)])
    assert gptq.factorize(rounded.mean(dim=0) / 1000, 1e-3, 32).damping > 1e-3


def test_no_token_is_an_error() -> None:
    hessian = Hessian(32)
    hessian.add(torch.empty(0, 32))
    with pytest.raises(SolveError, match="no calibration token"):
        hessian.mean()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_inputs_are_an_error(value: float) -> None:
    inputs = drawn(10, 32)
    inputs[3, 3] = value
    with pytest.raises(SolveError, match="inputs are not finite"):
        hessian_of(inputs)


def test_inputs_that_are_all_zero_are_an_error() -> None:
    with pytest.raises(SolveError, match="inputs are all zero"):
        hessian_of(torch.zeros(10, 32))


@pytest.mark.parametrize("rows", [COLUMNS // 4, COLUMNS])  # few are summed in another way
def test_moments_are_the_means_they_say(rows: int) -> None:
    served, parent = drifted(50)
    found = Moments(weight := drawn(rows, COLUMNS))
    for ours, theirs in zip(*(torch.split(t, [20, 1, 29]) for t in (served, parent)), strict=True):
        found.add(ours, theirs)
    hessian = served.double().T @ served.double() / 50
    drift = (parent - served).double().T @ served.double() / 50
    assert found.hessian.tokens == 50
    torch.testing.assert_close(found.hessian.mean().double(), hessian, rtol=1e-4, atol=1e-4)
    asked = weight.double() @ drift
    torch.testing.assert_close(found.pull().double(), asked, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        found.pull(slice(1, 9, 3)).double(), asked[1:9:3], rtol=1e-3, atol=1e-3
    )


def test_moments_of_several_devices_are_those_of_all_their_tokens() -> None:
    served, parent = drifted(90)
    whole = moments(served, parent)
    shares = [moments(served[place::3], parent[place::3]) for place in range(3)]
    found = merged(shares, CPU)
    assert found.hessian.tokens == 90
    eye = torch.eye(COLUMNS)
    torch.testing.assert_close(found.pull(), whole.pull(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.times(eye), whole.times(eye), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [0, 1, 50])
@pytest.mark.parametrize("adds", [False, True])
def test_a_sample_tells_what_the_moments_tell(*, tokens: int, adds: bool) -> None:
    weight, (served, parent) = drawn(ROWS, COLUMNS), drifted(tokens)
    kept, counted = held_out(tokens, weight, adds=adds), Moments(weight, adds=adds)
    gap = drawn(tokens, ROWS, seed=3) if adds else None
    assert isinstance(kept, Sample)
    assert isinstance(held_out(COLUMNS + 1, weight), Moments)
    for place in (slice(0, 20), slice(20, None)):
        for each in (kept, counted):
            each.add(served[place], parent[place], gap if gap is None else gap[place])
    assert kept.is_zero() == counted.is_zero() == (tokens == 0)
    for some in (slice(None), slice(1, ROWS, 3)):
        ours, theirs = kept.asked(some), counted.asked(some)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    if tokens:
        other = drawn(ROWS, COLUMNS, seed=8)
        ours, theirs = kept.times(weight), counted.times(weight)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        # Their factors are rounded on a CPU that multiplies bfloat16.
        rounds = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        ours, theirs = kept.gained(weight, other), counted.gained(weight, other)
        torch.testing.assert_close(ours, theirs, rtol=2**-4 if rounds else 1e-3, atol=1e-3)


def test_a_sample_keeps_its_tokens_whatever_becomes_of_them() -> None:
    served, parent = drifted(10)
    kept = Sample(torch.eye(COLUMNS), 10)
    kept.add(served, parent)
    before = kept.times(torch.eye(COLUMNS))
    served.zero_()
    assert kept.asked().any() and torch.equal(kept.times(torch.eye(COLUMNS)), before)


def test_no_token_has_no_drift() -> None:
    assert torch.equal(Moments(torch.eye(3)).pull(), torch.zeros(3, 3))
