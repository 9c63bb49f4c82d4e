"""`quant.int8`: activations as an int8 kernel sees them."""

from __future__ import annotations

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant import int8


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
