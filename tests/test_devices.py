"""`solver.devices`: names become devices that are there, or a refusal that says what is not."""

from __future__ import annotations

import pytest
import torch

from quant.errors import RecipeError
from quant.solver import devices

CPU = torch.device("cpu")


def test_a_list_of_names_is_a_list_of_devices() -> None:
    assert devices.named("cpu") == [CPU]
    assert devices.named("cpu, cpu") == [CPU, CPU]
    assert devices.first("cpu,cpu") == CPU


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ("gpu", "no device|not a device"),
        ("cpu,", "not a device"),
        ("meta", "cpu or cuda is needed"),
        ("cuda:63", "sees no CUDA device|this machine has"),
    ],
)
def test_what_is_not_there_is_refused(names: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        devices.named(names)


def test_sixteen_bits_are_for_devices_made_for_them_and_runs_that_allow_it() -> None:
    cuda = torch.device("cuda")
    assert devices.forward_dtype(cuda, exact=False) == torch.bfloat16
    for device, exact in ((cuda, True), (CPU, True), (CPU, False)):
        assert devices.forward_dtype(device, exact=exact) == torch.float32


def test_rounded_products_are_near_the_exact_ones_until_their_block_ends() -> None:
    left, right = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    exact = left @ right
    with devices.products(rounded=True):
        near = left @ right
        with devices.products(rounded=False):
            assert torch.equal(left @ right, exact)
    assert float((near - exact).norm()) <= 2**-7 * float(exact.norm())
    assert torch.equal(left @ right, exact)
