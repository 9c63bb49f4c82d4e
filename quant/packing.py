"""Bit layout of quantized codes. Knows words and shifts; knows nothing of models or files.

The AutoGPTQ checkpoint layout ("v1"): unsigned codes, several to a 32-bit word, the first in the
lowest bits. Weights are packed along the input dimension, zero points along the output dimension
and stored one too low (loaders add the one back).
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDTHS = (2, 4, 8)


def pack_gptq(codes: Tensor, bits: int) -> Tensor:
    """[out, in] codes in 0 .. 2**bits - 1 -> int32 words [in * bits / 32, out]."""
    per_word = _per_word(codes.shape[1], bits)
    shape = codes.shape[1] // per_word, codes.shape[0]
    words = torch.zeros(shape, dtype=torch.int32, device=codes.device)
    for slot in range(per_word):
        words |= codes[:, slot::per_word].T.to(torch.int32) << (bits * slot)
    return words


def unpack_gptq(words: Tensor, bits: int) -> Tensor:
    """int32 words [in * bits / 32, out] -> uint8 codes [out, in]; undoes `pack_gptq`."""
    per_word = 32 // bits
    codes = torch.empty(words.shape[1], words.shape[0] * per_word, dtype=torch.uint8)
    mask = (1 << bits) - 1
    for slot in range(per_word):
        # The shift is arithmetic: the mask drops the copies of the sign bit.
        codes[:, slot::per_word] = ((words >> (bits * slot)) & mask).T.to(torch.uint8)
    return codes


def pack_zeros(zeros: Tensor, bits: int) -> Tensor:
    """[groups, out] zero points in 1 .. 2**bits -> int32 words [groups, out * bits / 32]."""
    return pack_gptq(zeros - 1, bits).T.contiguous()


def unpack_zeros(words: Tensor, bits: int) -> Tensor:
    """int32 words [groups, out * bits / 32] -> zero points [groups, out], as int32."""
    return unpack_gptq(words.T.contiguous(), bits).to(torch.int32) + 1


def _per_word(values: int, bits: int) -> int:
    if bits not in WIDTHS:
        raise ValueError(f"{bits} bits do not fill a word evenly; one of {WIDTHS} is needed")
    per_word = 32 // bits
    if values % per_word:
        raise ValueError(f"{values} codes of {bits} bits do not fill whole 32-bit words")
    return per_word
