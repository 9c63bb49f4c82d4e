"""Which layer can take over a scale from the inputs of others, found by experiment.

x W^T = (x / s) (s W)^T, and where x comes out of a norm or of a linear layer, that layer's own
weights can do the division for good: the model computes the same. Whether they can is not read off
the architecture. A few tokens run through the block with one layer's outputs scaled by random
factors; it feeds a group when exactly that group's inputs scale by them, and when undoing the
factors in the group's weights leaves the block's output as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant.solver.trace import Trace

_TOLERANCE = 1e-3  # of a token's largest: float32 through one block, against factors up to 2


@dataclass(frozen=True, slots=True)
class Feed:
    """A layer whose weights can scale the inputs of a group, and nothing else.

    `own` is its weight, which may have more bits than what forwards compute with. `offset` is 1
    where a norm multiplies by 1 + weight. `first` is the first of a linear layer's rows that do: a
    fused layer's second half may be what reaches the group.
    """

    name: str
    layer: nn.Module
    own: Tensor
    offset: float = 0.0
    first: int = 0

    def scaled(self, weight: Tensor, factors: Tensor) -> Tensor:
        """The weight [rows] or [rows, ...] that puts out `factors` times as much."""
        made = weight.clone()
        part = made[self.first :] + self.offset
        made[self.first :] = part * factors.view(-1, *[1] * (weight.ndim - 1)) - self.offset
        return made

    def folded(self, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """The norm's weight that divides by `scale`; as it was where `dtype` could not hold it."""
        made = self.scaled(self.own, 1 / scale).to(dtype)
        holds = made.isfinite() & (made.float() + self.offset != 0)
        return torch.where(holds, made, self.own.to(dtype))

    def divisor(self, folded: Tensor) -> Tensor:
        """By what the inputs are divided once `folded` is the weight of the norm."""
        was, now = self.own + self.offset, folded + self.offset
        return torch.where(now == 0, torch.ones_like(now), was / now)


def found(block: nn.Module, groups: Sequence[Sequence[str]], trace: Trace) -> dict[str, Feed]:
    """The feed of each group that has one, by the name of the group's first layer."""
    inputs, output = trace()
    # Zeros are any factor times themselves: whatever is scaled would seem to feed them.
    groups = [group for group in groups if bool(inputs[group[0]].any())]
    layers = dict(block.named_modules())
    feeds: dict[str, Feed] = {}
    for name, layer in layers.items():
        for width in sorted({read.shape[-1] for read in inputs.values()}):
            for feed in _candidates(name, layer, width):
                asked = [
                    group
                    for group in groups
                    if inputs[group[0]].shape[-1] == width
                    and group[0] not in feeds
                    and name not in group
                ]
                factors = torch.logspace(-1, 1, width, base=2, device=output.device)
                factors = factors[torch.randperm(width, generator=torch.Generator().manual_seed(0))]
                # One forward for all groups: the experts of a mixture are hundreds.
                with _scaled(feed, factors):
                    moved = trace()[0]
                    for group in asked:
                        if not _close(moved[group[0]], inputs[group[0]] * factors):
                            continue
                        with _undone([layers[member] for member in group], factors):
                            if _close(trace()[1], output):
                                feeds[group[0]] = feed
    return feeds


def _candidates(name: str, layer: nn.Module, width: int) -> Iterator[Feed]:
    """Layers without a bias, which would have to be scaled in the 16 bits it is stored in."""
    own = dict(layer.named_parameters(recurse=False))
    if list(own) != ["weight"]:
        return
    weight = own["weight"]
    if isinstance(layer, nn.Linear) and layer.out_features in (width, 2 * width):
        yield Feed(name, layer, weight, first=layer.out_features - width)
    elif weight.shape == (width,):
        yield Feed(name, layer, weight)
        yield Feed(name, layer, weight, offset=1.0)


@contextmanager
def _scaled(feed: Feed, factors: Tensor) -> Iterator[None]:
    weight = feed.layer.get_parameter("weight")
    held = weight.data
    weight.data = feed.scaled(held, factors)
    try:
        yield
    finally:
        weight.data = held


@contextmanager
def _undone(layers: Sequence[nn.Module], factors: Tensor) -> Iterator[None]:
    held = [layer.get_parameter("weight").data for layer in layers]
    for layer, weight in zip(layers, held, strict=True):
        layer.get_parameter("weight").data = weight / factors
    try:
        yield
    finally:
        for layer, weight in zip(layers, held, strict=True):
            layer.get_parameter("weight").data = weight


def _close(one: Tensor, other: Tensor) -> bool:
    """Token by token: the first one's values are often a thousand times everybody else's."""
    missed, largest = (one - other).abs().amax(dim=-1), other.abs().amax(dim=-1)
    return bool((missed <= _TOLERANCE * largest).all())
