"""`quant.packing`: round trips, and the AutoGPTQ v1 layout written down a second time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant import packing

WIDTHS = (2, 4, 8)
Words = npt.NDArray[np.int32]


def autogptq_qweight(codes: npt.NDArray[np.int64], bits: int) -> Words:
    """[in, out] unsigned codes, word by word as AutoGPTQ's QuantLinear.pack does it."""
    per_word = 32 // bits
    words = np.zeros((codes.shape[0] // per_word, codes.shape[1]), dtype=np.uint32)
    for row in range(words.shape[0]):
        for slot in range(per_word):
            words[row] |= codes[row * per_word + slot].astype(np.uint32) << np.uint32(bits * slot)
    return words.view(np.int32)


def autogptq_dequantize(tensors: dict[str, Tensor], bits: int) -> Tensor:
    """float64 [out, in] of one layer, read with AutoGPTQ's v1 formula and its g_idx."""
    mask = np.uint32((1 << bits) - 1)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    qweight = tensors["qweight"].numpy().view(np.uint32)
    qzeros = tensors["qzeros"].numpy().view(np.uint32)
    codes = (qweight[:, None, :] >> shifts[None, :, None]) & mask  # [words, slots, out]
    zeros = (qzeros[:, :, None] >> shifts[None, None, :]) & mask  # [groups, words, slots]
    rows = codes.reshape(-1, qweight.shape[1]).astype(np.float64)
    offsets = zeros.reshape(qzeros.shape[0], -1).astype(np.float64) + 1
    group = tensors["g_idx"].numpy()
    scales = tensors["scales"].to(torch.float64).numpy()
    return torch.from_numpy(scales[group] * (rows - offsets[group])).T


@st.composite
def codes_of(draw: st.DrawFn) -> tuple[Tensor, int]:
    bits = draw(st.sampled_from(WIDTHS))
    rows, words = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    seed = draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1 << bits, (rows, words * 32 // bits), generator=generator), bits


@settings(max_examples=80, deadline=None)
@given(codes_of())
def test_codes_come_back(drawn: tuple[Tensor, int]) -> None:
    codes, bits = drawn
    words = packing.pack_gptq(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (codes.shape[1] * bits // 32, len(codes))
    assert torch.equal(packing.unpack_gptq(words, bits).long(), codes)


@settings(max_examples=80, deadline=None)
@given(codes_of())
def test_zero_points_come_back(drawn: tuple[Tensor, int]) -> None:
    codes, bits = drawn
    zeros = (codes + 1).int()
    words = packing.pack_zeros(zeros, bits)
    assert words.is_contiguous() and words.shape == (len(zeros), zeros.shape[1] * bits // 32)
    assert torch.equal(packing.unpack_zeros(words, bits), zeros)


@settings(max_examples=80, deadline=None)
@given(codes_of())
def test_words_are_those_of_autogptq(drawn: tuple[Tensor, int]) -> None:
    codes, bits = drawn
    theirs = autogptq_qweight(codes.T.numpy(), bits)
    assert np.array_equal(packing.pack_gptq(codes, bits).numpy(), theirs)


def test_the_first_code_lies_in_the_lowest_bits() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 15]])
    assert packing.pack_gptq(codes, 4).item() == 0xF7654321 - (1 << 32)


def test_zero_points_are_stored_one_too_low() -> None:
    assert packing.pack_zeros(torch.full((1, 8), 8), 4).item() == 0x77777777


@pytest.mark.parametrize("bits", [3, 5, 16])
def test_a_width_that_does_not_fill_words_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"{bits} bits do not fill a word"):
        packing.pack_gptq(torch.zeros(1, 32, dtype=torch.int32), bits)


def test_codes_that_end_inside_a_word_are_refused() -> None:
    with pytest.raises(ValueError, match="12 codes of 4 bits"):
        packing.pack_gptq(torch.zeros(1, 12, dtype=torch.int32), 4)
