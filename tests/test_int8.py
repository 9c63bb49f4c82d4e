"""`solver.int8`: activations as an int8 kernel sees them, and what makes them easier to round."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant.solver import int8

pytestmark = pytest.mark.arithmetic


def activations(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def test_agrees_with_compressed_tensors() -> None:
    inputs = activations(40, 96)
    scale = inputs.abs().amax(dim=-1, keepdim=True) / 127
    args = QuantizationArgs(
        num_bits=8,
        type=QuantizationType.INT,
        symmetric=True,
        strategy=QuantizationStrategy.TOKEN,
        dynamic=True,
    )
    theirs = fake_quantize(inputs, scale, torch.zeros_like(scale), args)
    torch.testing.assert_close(int8.as_served(inputs), theirs)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.floats(1e-6, 1e6), st.integers(0, 10_000))
def test_no_value_moves_by_more_than_half_a_step(columns: int, size: float, seed: int) -> None:
    inputs = activations(3, 5, columns, seed=seed) * size
    step = inputs.abs().amax(dim=-1, keepdim=True) / 127
    assert bool(((int8.as_served(inputs) - inputs).abs() <= step * 0.5001).all())


def test_every_token_has_its_own_scale() -> None:
    inputs = torch.tensor([[1.0, 0.5, 0.001], [1000.0, 500.0, 1.0]])
    seen = int8.as_served(inputs)
    assert torch.equal(seen[0], int8.as_served(inputs[:1])[0])
    assert float(seen[0, 1]) != 0 and float(seen[1, 2]) == 0


def test_a_token_of_zeros_stays_zero() -> None:
    inputs = activations(4, 16)
    inputs[2] = 0
    seen = int8.as_served(inputs)
    assert bool((seen[2] == 0).all()) and bool(torch.isfinite(seen).all())


def test_the_inputs_are_left_alone() -> None:
    inputs = activations(4, 16)
    before = inputs.clone()
    assert not torch.equal(int8.as_served(inputs), before)
    assert torch.equal(inputs, before)


def test_what_was_rounded_once_is_not_rounded_again() -> None:
    seen = int8.as_served(activations(50, 64))
    torch.testing.assert_close(int8.as_served(seen), seen)


def product_loss(weight: Tensor, inputs: Tensor, scale: Tensor) -> float:
    """What rounding both sides costs when inputs are divided by `scale`."""
    heavier = weight * scale
    step = heavier.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127
    served = int8.as_served(inputs / scale) @ ((heavier / step).round() * step).T
    return float((served - inputs @ weight.T).square().sum())


def smoothed(weight: Tensor, inputs: Tensor) -> Tensor:
    """The scale that is best for the layer's own outputs."""
    return int8.smoothing(weight, inputs, partial(product_loss, weight, inputs))


def outlying(seed: int = 0, by: float = 50) -> tuple[Tensor, Tensor]:
    """A weight, and inputs of which a few channels are far larger than the others."""
    inputs = activations(100, 64, seed=seed)
    inputs[:, ::16] *= by
    return activations(32, 64, seed=seed + 1), inputs


def test_smoothing_makes_outliers_harmless() -> None:
    weight, inputs = outlying()
    weight[:, ::16] /= 50
    scale = smoothed(weight, inputs)
    ones = torch.ones(64)
    assert product_loss(weight, inputs, scale) < 0.05 * product_loss(weight, inputs, ones)
    assert float(scale[::16].min()) > 3 * float(scale.median())


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 1000), st.integers(1, 3))
def test_smoothing_is_never_worse_than_none_where_it_was_chosen(
    seed: int, by: float, tail: int
) -> None:
    weight, inputs = outlying(seed, by)
    weight = weight**tail
    scale = smoothed(weight, inputs)
    none = product_loss(weight, inputs, torch.ones(64))
    assert product_loss(weight, inputs, scale) <= none * (1 + 1e-5)


def test_smoothing_changes_nothing_but_what_is_rounded() -> None:
    weight, inputs = outlying()
    before = weight.clone(), inputs.clone()
    scale = smoothed(weight, inputs)
    exact, moved = inputs.double() @ weight.double().T, (inputs / scale) @ (weight * scale).T
    torch.testing.assert_close(moved.double(), exact, rtol=1e-4, atol=1e-2)
    assert torch.equal(weight, before[0]) and torch.equal(inputs, before[1])


def test_channels_of_zeros_do_not_spoil_the_smoothing() -> None:
    weight, inputs = outlying()
    inputs[:, 5], weight[:, 9], weight[3] = 0, 0, 0
    inputs[:, 11] = weight[:, 11] = 0
    scale = smoothed(weight, inputs)
    assert bool(torch.isfinite(scale).all()) and bool((scale > 0).all())
    none = product_loss(weight, inputs, torch.ones(64))
    assert product_loss(weight, inputs, scale) < 0.9 * none


def test_where_nothing_can_be_gained_nothing_is_smoothed() -> None:
    weight, inputs = outlying()
    ones = torch.ones(64)
    assert torch.equal(smoothed(weight, torch.zeros_like(inputs)), ones)
    assert torch.equal(smoothed(torch.zeros_like(weight), inputs), ones)
    assert torch.equal(smoothed(weight, inputs[:0]), ones)
    assert torch.equal(smoothed(weight, inputs * torch.nan), ones)
