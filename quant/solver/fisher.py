"""Random vectors of the predictions' Fisher information, sent back to where the last block ends.

At every token the KL of predictions to second order is half of d^T F d for what changes in the
logits, F = diag(p) - p p^T: the mean of (v . d)^2 / 2 for random v of covariance F. Reads what is
outside the blocks, once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.intake.source import Source
from quant.solver import head
from quant.solver.blocks import Decoder, Stream


def gradient(decoder: Decoder, source: Source, stream: Stream) -> Tensor:
    """Of v . logits, one v for each token, where the last block ends."""
    draw = torch.Generator().manual_seed(0)
    with head.filled(decoder, source):
        rows = zip(torch.split(stream.hidden, 1), torch.split(stream.mask, 1), strict=True)
        return torch.cat([_of_predictions(decoder, *row, draw) for row in rows])


def _of_predictions(
    decoder: Decoder, hidden: Tensor, mask: Tensor, draw: torch.Generator
) -> Tensor:
    """The model's own head, run on what the blocks put out, and back."""
    final = hidden.detach().requires_grad_()
    with torch.enable_grad():
        logits = head.logits(decoder, final)[mask]
    root = logits.detach().float().softmax(dim=-1).sqrt_()  # [tokens, vocabulary]
    back = torch.randn(root.shape, generator=draw).to(root.device).mul_(root)
    back -= root.square_().mul_(back.sum(dim=-1, keepdim=True))
    return torch.autograd.grad(logits, final, back.to(logits.dtype))[0]
