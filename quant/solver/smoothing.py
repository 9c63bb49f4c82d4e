"""What the inputs of a group of layers are divided by before they are rounded to int8.

Chosen by experiment on a few tokens of every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from quant.solver import descent, int8
from quant.solver.walk import Group

_SAMPLE = 64  # tokens of each batch


def chosen(weight: Tensor, group: Group, even: Sequence[Tensor]) -> Tensor:
    """What to divide a group's inputs by before they are rounded; ones where nothing could.

    The one whose rounding disturbs least what a sample of tokens, evened, comes out as: of the
    block where a norm feeds the group, of the layers where another layer does.
    """
    if group.feed is None:
        return torch.ones(weight.shape[1], device=weight.device)
    first = (given.parent[:_SAMPLE] for given in group.inputs)
    pairs = zip(first, even, strict=True)
    sample = torch.cat([(rows * by[:_SAMPLE]).to(weight.device) for rows, by in pairs])
    if isinstance(group.feed.layer, nn.Linear):
        exact = sample @ weight.T
        return int8.smoothing(
            weight, sample, lambda scale: _distance(int8.product(sample, weight, scale), exact)
        )
    exact = group.outcome({})
    by = torch.cat(descent.evening([exact]))

    def disturbed(scale: Tensor) -> float:
        instead = {linear: _rounded(linear, scale) for linear in group.linears.values()}
        return _distance(group.outcome(instead) * by, exact * by)

    return int8.smoothing(weight, sample, disturbed)


def _rounded(linear: nn.Linear, scale: Tensor) -> Callable[[Tensor], Tensor]:
    """The layer in int8 without any solving, its inputs divided by `scale`."""

    def product(inputs: Tensor) -> Tensor:
        made = int8.product(inputs, linear.weight, scale).to(inputs.dtype)
        return made if linear.bias is None else made + linear.bias

    return product


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).square().sum())
