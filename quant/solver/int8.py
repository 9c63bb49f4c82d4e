"""W8A8: int8 weights with a scale per output channel, activations int8 with a scale per token.

Tensors in, tensors out. Symmetric on both sides, -127 .. 127, as compressed-tensors and vLLM's
int8 kernels compute it. Weights are solved like any other grid (`gptq`); what is special to W8A8 is
what a layer sees: inputs already rounded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quant.solver.grid import Levels

CHANNEL = Levels(-127, 127, torch.float32)
# How much of the spread between input channels moves into the weights.
_STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def as_served(inputs: Tensor) -> Tensor:
    """Activations [..., columns] as an int8 kernel sees them: rounded with a scale per token."""
    inputs = inputs.float()
    scale = inputs.abs().amax(dim=-1, keepdim=True) / CHANNEL.high
    # A token of zeros has no scale; any positive one keeps it zero.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (inputs / scale).round_().mul_(scale)


def smoothing(weight: Tensor, inputs: Tensor, disturbed: Callable[[Tensor], float]) -> Tensor:
    """Scale [columns] to divide inputs [tokens, columns] by and multiply weight [rows, columns].

    s_j = max|x_j|^a / max|w_j|^(1-a) (SmoothQuant, 2211.10438), of geometric mean one, for the a
    at which `disturbed` says that rounding both costs least; ones where that is no better.
    """
    best = torch.ones_like(weight[0])
    if not len(inputs):
        return best
    least = disturbed(best)
    widest = inputs.abs().amax(dim=0).clamp(min=1e-5)
    heaviest = weight.abs().amax(dim=0).clamp(min=1e-5)
    for strength in _STRENGTHS:
        scale = widest**strength / heaviest ** (1 - strength)
        scale /= scale.log().mean().exp()
        loss = disturbed(scale)
        if loss < least:
            best, least = scale, loss
    return best


def product(inputs: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """inputs [..., columns] weight^T, smoothed by `scale` and both rounded, the weight by row."""
    heavier = weight.float() * scale
    step = heavier.abs().amax(dim=1, keepdim=True) / CHANNEL.high
    step = torch.where(step > 0, step, torch.ones_like(step))
    return as_served(inputs / scale) @ (heavier / step).round_().mul_(step).T
