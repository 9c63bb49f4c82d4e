"""`solver.trial`: what predictions feel of layers that are stored, and what is made up for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from quant.solver import trial
from quant.solver.blocks import Stream
from quant.solver.trial import Trial

pytestmark = pytest.mark.arithmetic

WIDTH, TOKENS = 16, 400


class Block(nn.Module):
    """A stream of states, and two layers of which the second adds to it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH, bias=False)
        self.outer = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        added: Tensor = self.outer(self.inner(hidden))
        return hidden + added


@pytest.fixture
def block() -> Block:
    torch.manual_seed(3)
    return Block().requires_grad_(requires_grad=False)


def felt(block: Block, change: Callable[[Tensor], Tensor], huge: float = 1.0) -> list[float]:
    """Of both layers with their weights changed, one after the other; one token of the stream that
    judges is `huge`."""
    hidden = torch.randn(3, 1, TOKENS, WIDTH)
    hidden[0, 0, 0] *= huge
    mask = torch.ones(1, TOKENS, dtype=torch.bool)
    again = [partial(trial.through, block, 0, Stream(each, mask, [((), {})])) for each in hidden]
    passes = [again[0](torch.randn(1, TOKENS, WIDTH)), *(each() for each in again[1:])]
    trials = [
        Trial({name: layer}, layer.weight, change(layer.weight), nn.Identity(), adds)
        for name, layer, adds in (("inner", block.inner, False), ("outer", block.outer, True))
    ]
    return trial.weighed(trials, passes, again, damping=1e-4)


def test_what_the_layer_behind_can_make_up_for_is_not_felt(block: Block) -> None:
    inner, outer = felt(block, lambda weight: 1.2 * weight)
    # The layer that adds has none behind it that could.
    assert inner < 1e-4 * outer


def test_what_no_layer_can_make_up_for_is_felt(block: Block) -> None:
    lost = torch.ones(WIDTH, 1)
    lost[:4] = 0
    inner, outer = felt(block, lambda weight: weight * lost)
    assert inner > 0.05 * outer


def test_layers_are_as_they_were_afterwards(block: Block) -> None:
    before = {name: weight.clone() for name, weight in block.state_dict().items()}
    felt(block, torch.neg)
    assert "forward" not in vars(block.inner)
    assert all(torch.equal(weight, before[name]) for name, weight in block.state_dict().items())


def test_one_huge_token_does_not_outweigh_all_others(block: Block) -> None:
    torch.manual_seed(4)
    _, plain = felt(block, lambda weight: 1.2 * weight)
    torch.manual_seed(4)
    _, huge = felt(block, lambda weight: 1.2 * weight, huge=1000.0)
    assert huge < 1.2 * plain
