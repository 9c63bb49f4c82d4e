"""What each calibration token counts for, where a layer is fitted to all of them.

Squares are summed over tokens: without factors a few huge ones would be all there is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from quant.solver import descent
from quant.solver.walk import Given

_PRIOR = 128  # tokens of its own that outweigh what an expert is shown of the others'


def counted(inputs: Sequence[Given]) -> list[Tensor]:
    """Factors [tokens, 1] for the rows of a layer's inputs: evened, and an expert's sample of what
    others get counts as `_PRIOR` tokens of its own, whatever its size.

    An expert that the router chose often is left to its own tokens, one that it hardly chose is
    solved for what any token would be to it: H = (n H_own + m H_sample) / (n + m).
    """
    even = descent.evening(given.parent for given in inputs)
    routed = [given.routed for given in inputs if given.routed is not None]
    if not routed:
        return even
    others = sum(int((~each).sum()) for each in routed)
    share = math.sqrt(_PRIOR / max(others, 1))
    return [
        by * torch.where(own, 1.0, share)[:, None] for by, own in zip(even, routed, strict=True)
    ]


def gaps(inputs: Sequence[Given], even: Sequence[Tensor]) -> Iterator[Tensor | None]:
    """Of the streams that a layer adds to, weighted as its tokens are, and evened: where a few
    numbers of a stream are huge, so are their errors, and no layer can mend those."""

    def weighted() -> Iterator[Tensor]:
        for given, by in zip(inputs, even, strict=True):
            if (gap := given.gap) is not None:
                yield gap * by

    if inputs[0].gap is None:
        return iter([None] * len(inputs))
    levels = descent.evening(weighted())
    return (gap * level for gap, level in zip(weighted(), levels, strict=True))
