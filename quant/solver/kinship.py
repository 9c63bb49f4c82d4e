"""What the linear layers of a block are to each other, found by short forwards of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from quant.solver import experts, folds, residual
from quant.solver.blocks import Stream
from quant.solver.folds import Feed
from quant.solver.trace import Tracer


@dataclass(frozen=True, slots=True)
class Kinship:
    """Layers by their names in the block, in calling order: `groups` read the same input, `feeds`
    scale the inputs of a group, which goes by its first layer, and `adders` add to the stream."""

    groups: Sequence[Sequence[str]]
    feeds: Mapping[str, Feed]
    adders: Sequence[str]


def found(
    block: nn.Module, forward: Callable[[Stream], Tensor], sample: Stream, *, scales_inputs: bool
) -> Kinship:
    """Of a block that is run over a few tokens; what feeds whom where that is worth a look."""
    trace = Tracer(block, partial(forward, sample))
    with experts.sampling(block, one_in=1):
        groups = trace.groups()
        feeds = _feeds(block, groups, forward, sample) if scales_inputs else {}
        return Kinship(groups, feeds, residual.adders(block, groups, trace))


def _feeds(
    block: nn.Module,
    groups: Sequence[Sequence[str]],
    forward: Callable[[Stream], Tensor],
    sample: Stream,
) -> dict[str, Feed]:
    """Told by differences too small for 16 bits."""
    own = {weight: weight.data for weight in block.parameters()}
    exact = Stream(sample.hidden.float(), sample.mask, sample.calls)
    try:
        for weight, held in own.items():
            weight.data = held.float()
        return folds.found(block, groups, Tracer(block, partial(forward, exact)))
    finally:
        for weight, held in own.items():
            weight.data = held
