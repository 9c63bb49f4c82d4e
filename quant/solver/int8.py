"""W8A8: int8 weights with a scale per output channel, activations int8 with a scale per token.

Tensors in, tensors out. Symmetric on both sides, -127 .. 127, as compressed-tensors and vLLM's
int8 kernels compute it. Weights are solved like any other grid (`gptq`); what is special to W8A8 is
what a layer sees: inputs already rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.solver.grid import Levels

CHANNEL = Levels(-127, 127, torch.float32)
# How much of the spread between input channels moves into the weights; 0 leaves all of it.
_STRENGTHS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def as_served(inputs: Tensor) -> Tensor:
    """Activations [..., columns] as an int8 kernel sees them: rounded with a scale per token."""
    scale = inputs.abs().amax(dim=-1, keepdim=True) / CHANNEL.high
    # A token of zeros has no scale; any positive one keeps it zero.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (inputs / scale).round_().mul_(scale)


def smoothing(weight: Tensor, inputs: Tensor) -> Tensor:
    """Scale [columns] to divide inputs [tokens, columns] by and multiply weight [rows, columns].

    s_j = max|x_j|^a / max|w_j|^(1-a) (SmoothQuant, 2211.10438) for the a whose rounded product is
    nearest the exact one on these tokens; ones where none is better than doing nothing.
    """
    if not len(inputs):
        return torch.ones_like(weight[0])
    widest, heaviest = inputs.abs().amax(dim=0), weight.abs().amax(dim=0)
    exact = inputs @ weight.T
    best, least = torch.ones_like(widest), torch.inf
    for strength in _STRENGTHS:
        scale = widest.clamp(min=1e-5) ** strength / heaviest.clamp(min=1e-5) ** (1 - strength)
        scale = scale / scale.log().mean().exp() if strength else torch.ones_like(widest)
        loss = float(
            (as_served(inputs / scale) @ _rounded(weight * scale).T - exact).square().sum()
        )
        if loss < least:
            best, least = scale, loss
    return best


def _rounded(weight: Tensor) -> Tensor:
    step = weight.abs().amax(dim=1, keepdim=True) / CHANNEL.high
    step = torch.where(step > 0, step, torch.ones_like(step))
    return (weight / step).round_().mul_(step)
