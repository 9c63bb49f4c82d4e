"""The base that QLoRA trained on: weights rounded to NF4 and back. Tensors in, tensors out.

The code table is NormalFloat4 as Dettmers et al. print it (QLoRA, arXiv 2305.14314, appendix E):
quantiles of a standard normal, eight of them positive, seven negative, and an exact zero, scaled
to [-1, 1]. Blocks of 64 weights in row order share their absolute maximum. Double quantization
(section 3 there) stores those maxima, less their mean, in blocks of 256 with the 8-bit dynamic tree
type of arXiv 1511.04561, which is what bitsandbytes uses for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK, OUTER_BLOCK = 64, 256
CODES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def round_trip(weight: Tensor, *, double: bool = False) -> Tensor:
    """`weight` [out, in] in NF4 and back, float32; `double` quantizes the blocks' maxima too."""
    flat = weight.to(torch.float32).reshape(-1)
    blocks = _blocks(flat, BLOCK)  # [blocks, 64]
    largest = blocks.abs().amax(dim=1)
    codes = _nearest(blocks / _divisor(largest)[:, None], torch.tensor(CODES))
    if double:
        mean = largest.mean()
        largest = _dynamic(largest - mean) + mean
    return (codes * largest[:, None]).reshape(-1)[: flat.numel()].view(weight.shape)


def dynamic_codes() -> Tensor:
    """The 256 values of the signed 8-bit dynamic type, ascending.

    A number is a power of ten from 1e-6 to 1 and a linear fraction of it: the larger the power, the
    more bits are left for the fraction, whose steps lie at the middles of equal parts of 0.1 to 1.
    """
    positive = []
    for bits in range(7):
        edges = torch.linspace(0.1, 1, 2**bits + 1)
        positive.append(10.0 ** (bits - 6) * (edges[:-1] + edges[1:]) / 2)
    magnitudes = torch.cat(positive)
    ends = torch.tensor([0.0, 1.0])
    return torch.cat([magnitudes, -magnitudes, ends]).sort().values


def _dynamic(values: Tensor) -> Tensor:
    blocks = _blocks(values, OUTER_BLOCK)  # [blocks, 256]
    largest = blocks.abs().amax(dim=1)[:, None]
    codes = _nearest(blocks / _divisor(largest), dynamic_codes())
    return (codes * largest).reshape(-1)[: values.numel()]


def _blocks(flat: Tensor, size: int) -> Tensor:
    short = -flat.numel() % size
    return torch.nn.functional.pad(flat, (0, short)).view(-1, size)


def _divisor(largest: Tensor) -> Tensor:
    """A block of zeros divides by one, and stays zeros."""
    return torch.where(largest > 0, largest, torch.ones_like(largest))


def _nearest(values: Tensor, codes: Tensor) -> Tensor:
    middles = (codes[1:] + codes[:-1]) / 2
    return codes[torch.bucketize(values, middles)]
