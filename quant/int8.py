"""W8A8: int8 weights with a scale per output channel, activations int8 with a scale per token.

Tensors in, tensors out. Symmetric on both sides, -127 .. 127, as compressed-tensors and vLLM's
int8 kernels compute it. Weights are solved like any other grid (`quant.gptq`); what is special
to W8A8 is what a layer sees: inputs already rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.grid import Levels

CHANNEL = Levels(-127, 127, torch.float32)


def as_served(inputs: Tensor) -> Tensor:
    """Activations [..., columns] as an int8 kernel sees them: rounded with a scale per token."""
    scale = inputs.abs().amax(dim=-1, keepdim=True) / CHANNEL.high
    # A token of zeros has no scale; any positive one keeps it zero.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (inputs / scale).round_().mul_(scale)
