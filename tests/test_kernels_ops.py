"""Packed linear layers answer what float32 arithmetic on the dequantized weights answers.

At the machine's own instruction-set level; tests/test_kernels.py repeats this file at AVX2 in
another process, because the level is decided once per process.
"""

from __future__ import annotations

from typing import Protocol

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from serve import kernels_native, kernels_ops

pytestmark = pytest.mark.arithmetic


class Make(Protocol):
    def __call__(
        self, codes: Tensor, scales: Tensor, bits: int, *, int8_rows: bool
    ) -> kernels_ops.PackedLinear: ...


ROWS = (1, 2, 3, 8, 17, 64, 300)  # every register tile, both unpackings, several tasks
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUPS = (32, 64, 128, -1)
# Rounding activations is all that native code loses: half a step of 1/32767 of the largest of at
# most 256, against a typical one about 3 times smaller. bfloat16 keeps 8 bits, PyTorch's kernel
# rounds activations, scales and output to it.
LOSS = {"native": 1e-4, "aten": 1e-2}
MAKERS: dict[str, Make] = {"native": kernels_ops.native, "aten": kernels_ops.aten}

needs_native = pytest.mark.skipif(not kernels_native.load(), reason="native kernels do not build")
paths = pytest.mark.parametrize("path", [pytest.param("native", marks=needs_native), "aten"])


def unit(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to `dtype`."""
    return torch.finfo(dtype).eps / 2


def random_layer(bits: int, group: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Every code of the width, negative scales too."""
    outputs, inputs = shape
    draw = torch.Generator().manual_seed(bits * 1000 + group)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=draw)
    groups = 1 if group == -1 else inputs // group
    scales = torch.randn(outputs, groups, generator=draw) * 2.0**-bits
    return codes, scales


def dequantized(codes: Tensor, scales: Tensor) -> Tensor:
    return codes.double() * scales.double().repeat_interleave(
        codes.shape[1] // scales.shape[1], dim=1
    )


def random_rows(count: int, inputs: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, inputs, generator=torch.Generator().manual_seed(count)).to(dtype)


def distance(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


@paths
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_plain_arithmetic(path: str, bits: int, group: int, dtype: torch.dtype) -> None:
    shape = (53, 300) if group == -1 else (53, 3 * group)  # no whole block, no multiple of 256
    codes, scales = random_layer(bits, group, shape)
    layer, weight = MAKERS[path](codes, scales, bits, int8_rows=False), dequantized(codes, scales)
    bias = torch.randn(53).to(dtype)
    for rows in ROWS:
        x = random_rows(rows, shape[1], dtype)
        wanted = x.double() @ weight.t()
        got = layer(x, None)
        assert got.dtype is dtype
        assert distance(got, wanted) <= LOSS[path] + unit(dtype), rows
        assert distance(layer(x, bias), wanted + bias.double()) <= LOSS[path] + unit(dtype), rows


@paths
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("inputs", [8, 100, 257, 1536, 2047])
def test_any_width_of_a_scale_per_output(path: str, bits: int, inputs: int) -> None:
    codes, scales = random_layer(bits, -1, (16, inputs))
    x = random_rows(5, inputs)
    got = MAKERS[path](codes, scales, bits, int8_rows=False)(x, None)
    assert distance(got, x.double() @ dequantized(codes, scales).t()) <= LOSS[path]


@needs_native
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", GROUPS)
def test_an_outlier_costs_its_neighbours_half_a_step(bits: int, group: int) -> None:
    """The bound of block floating point, for each output by itself."""
    codes, scales = random_layer(bits, group, (40, 384))
    weight, x = dequantized(codes, scales), random_rows(9, 384)
    x[:, ::100] *= 1000
    layer = kernels_ops.native(codes, scales, bits, int8_rows=False)
    runs = x.abs().view(9, -1, layer.width)  # [rows, chunks, width]
    step = runs.amax(dim=2).double() / 32767
    reach = weight.abs().view(40, -1, layer.width).sum(dim=2).t()
    arithmetic = 8 * unit(torch.float32) * (x.double().abs() @ weight.abs().t())
    error = (layer(x, None).double() - x.double() @ weight.t()).abs()
    assert (error <= step / 2 @ reach + arithmetic).all()


@needs_native
@pytest.mark.parametrize("per_token", [False, True])
def test_extreme_codes_and_activations_do_not_overflow(*, per_token: bool) -> None:
    """256 products of the largest magnitudes share a 32-bit sum."""
    for bits in (4, 8):
        for code in (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1):
            layer = kernels_ops.native(
                torch.full((16, 2048), code), torch.ones(16, 1), bits, int8_rows=per_token
            )
            for value in (127.0, -127.0):
                wanted = torch.full((12, 16), value * code * 2048)
                torch.testing.assert_close(layer(torch.full((12, 2048), value), None), wanted)


@paths
@pytest.mark.parametrize("size", [1e30, 1e-20])
@pytest.mark.parametrize("per_token", [False, True])
def test_size_of_activations_does_not_matter(path: str, size: float, *, per_token: bool) -> None:
    codes, scales = random_layer(8, -1, (24, 320))
    layer, x = MAKERS[path](codes, scales, 8, int8_rows=per_token), random_rows(6, 320)
    wanted = layer(x, None).double()
    assert distance(layer(x * size, None) / size, wanted) <= 1e-5 + (path == "aten") * LOSS[path]


@paths
@pytest.mark.parametrize("per_token", [False, True])
def test_rows_of_nothing_give_the_bias(path: str, *, per_token: bool) -> None:
    """Zeros, and floats too small to divide by, beside an ordinary row."""
    codes, scales = random_layer(8, -1, (24, 320))
    layer, bias = MAKERS[path](codes, scales, 8, int8_rows=per_token), torch.randn(24)
    x = random_rows(3, 320)
    x[0], x[2] = 0, 1e-38
    got = layer(x, bias)
    rounding = 0.0 if path == "native" else unit(torch.bfloat16)
    torch.testing.assert_close(got[[0, 2]], bias.expand(2, -1), rtol=rounding, atol=1e-30)
    assert not torch.allclose(got[1], bias, rtol=0.1)
    assert layer(x[:0], bias).shape == (0, 24)


@paths
@pytest.mark.parametrize("per_token", [False, True])
def test_layout_of_activations_does_not_matter(path: str, *, per_token: bool) -> None:
    codes, scales = random_layer(8, -1, (24, 64))
    layer, x = MAKERS[path](codes, scales, 8, int8_rows=per_token), random_rows(12, 64)
    plain = layer(x, None)
    assert torch.equal(layer(x.t().contiguous().t(), None), plain)
    assert torch.equal(layer(torch.cat([x, x], dim=1)[:, :64], None), plain)
    assert torch.equal(layer(x.view(3, 4, 64), None), plain.view(3, 4, 24))


@needs_native
@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_does_not_depend_on_its_batch(bits: int) -> None:
    codes, scales = random_layer(bits, 64, (53, 192))
    layer, x = kernels_ops.native(codes, scales, bits, int8_rows=False), random_rows(300, 192)
    together = layer(x, None)
    for rows in ROWS:
        assert torch.equal(layer(x[:rows], None), together[:rows])


def integers(x: Tensor) -> tuple[Tensor, Tensor]:
    """W8A8 as specified: a row's largest magnitude becomes 127."""
    most = x.float().abs().amax(dim=1, keepdim=True)
    return (x.float() * (torch.tensor(127.0) / most)).round().double(), most.double() / 127


@paths
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(53, 300), (64, 1536), (16, 8)])
def test_w8a8_is_exact_integer_arithmetic(
    path: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    codes, scales = random_layer(8, -1, shape)
    layer = MAKERS[path](codes, scales, 8, int8_rows=True)
    for rows in ROWS:
        x = random_rows(rows, shape[1], dtype)
        values, token = integers(x)
        factor = token * scales.double().t()
        wanted = values @ codes.double().t() * factor
        # Integers up to 2**24 are floats; past that, adding up chunks and factors rounds.
        size = values.abs() @ codes.double().abs().t() * factor.abs()
        error = (layer(x, None).double() - wanted).abs()
        output = unit(dtype) + (path == "aten") * unit(torch.bfloat16)
        assert (error <= 2 * output * wanted.abs() + 4 * unit(torch.float32) * size).all(), rows


@paths
def test_w8a8_survives_what_saturates_vllms_own_kernel(path: str) -> None:
    """All 127: stock vLLM on AVX2 sums pairs in 16 bits and answers 65280 for 8258048."""
    layer = MAKERS[path](torch.full((16, 512), 127), torch.ones(16, 1), 8, int8_rows=True)
    got = layer(torch.full((3, 512), 127.0), None)
    rounding = 0.0 if path == "native" else unit(torch.bfloat16)
    torch.testing.assert_close(got, torch.full((3, 16), 8258048.0), rtol=rounding, atol=0)


STRANGE = (float("nan"), float("inf"), -float("inf"))


def kinds(numbers: Tensor) -> Tensor:
    """0 for a number, its sign for an infinity, 2 for NaN."""
    wide = numbers.float()
    return torch.where(wide.isnan(), 2.0, torch.where(wide.isinf(), wide.sign(), 0.0))


@paths
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, -1), (8, 64), (8, -1)])
@pytest.mark.parametrize("strangers", [1, 2, 3, 192])
def test_what_is_not_finite_goes_in_and_comes_out(
    path: str, bits: int, group: int, dtype: torch.dtype, strangers: int
) -> None:
    """As PyTorch's: NaN stays NaN, infinity has a sign or none, other rows know nothing of it."""
    codes, scales = random_layer(bits, group, (53, 192))
    codes[:, 7] = 0  # what infinity times nothing is
    layer, weight = MAKERS[path](codes, scales, bits, int8_rows=False), dequantized(codes, scales)
    draw = torch.Generator().manual_seed(strangers)
    for rows in (1, 5, 40):
        x = random_rows(rows, 192, dtype)
        for row in range(0, rows, 2):
            places = torch.randperm(192, generator=draw)[:strangers]
            chosen = torch.randint(row % 3, 3, (strangers,), generator=draw)
            x[row, places] = torch.tensor(STRANGE)[chosen].to(dtype)
        got, wanted = layer(x, None), kinds(x.float() @ weight.float().t())
        if path == "aten" and bits == 8:  # two nibbles of a code may have two signs
            assert torch.equal(kinds(got) != 0, wanted != 0)
            assert (kinds(got) == 2)[wanted == 2].all()
        else:
            assert torch.equal(kinds(got), wanted)


@needs_native
@pytest.mark.parametrize("bits", [4, 8])
def test_infinities_that_agree_are_an_infinity(bits: int) -> None:
    codes, scales = torch.full((32, 96), 5), torch.ones(32, 3)
    codes[1, 50], codes[2, 50], scales[3] = -1, 0, -1
    layer = kernels_ops.native(codes, scales, bits, int8_rows=False)
    x = torch.full((2, 96), torch.inf)
    x[1, :50] = x[1, 51:] = 1.0
    wanted = torch.ones(2, 32)
    wanted[:, 2], wanted[:, 3], wanted[0, 1], wanted[1, 1] = 2, -1, 2, -1
    assert torch.equal(kinds(layer(x, torch.zeros(32))), wanted)


@paths
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stranger", STRANGE)
def test_w8a8_says_nan_for_a_row_that_has_no_scale(
    path: str, dtype: torch.dtype, stranger: float
) -> None:
    codes, scales = random_layer(8, -1, (53, 300))
    layer, x = MAKERS[path](codes, scales, 8, int8_rows=True), random_rows(6, 300, dtype)
    plain = layer(x, None)
    x[4, 299] = stranger
    got = layer(x, torch.ones(53).to(dtype))
    assert got[4].isnan().all()
    assert torch.equal(got[:4], layer(x[:4], torch.ones(53).to(dtype)))
    assert torch.equal(layer(x, None)[:4], plain[:4])


@pytest.mark.parametrize("stranger", STRANGE)
def test_wide_linear_hides_nothing(stranger: float) -> None:
    weight = torch.randn(1030, 75).bfloat16()
    for rows in (1, 3, 40):
        x = random_rows(rows, 75)
        x[-1, 70] = stranger
        assert torch.equal(kinds(kernels_ops.wide_linear(x, weight)), kinds(x @ weight.float().t()))


@needs_native
def test_pack_takes_the_native_kernels_where_they_build() -> None:
    codes, scales = random_layer(4, 32, (16, 64))
    assert isinstance(kernels_ops.pack(codes, scales, 4), kernels_ops.NativeLinear)
    int8 = kernels_ops.pack(codes, scales[:, :1], 8, int8_rows=True)
    assert isinstance(int8, kernels_ops.NativeLinear)
    assert int8.per_token


@needs_native
def test_a_layer_of_the_wrong_shape_is_refused() -> None:
    codes, scales = random_layer(4, 32, (16, 64))
    layer = kernels_ops.native(codes, scales, 4, int8_rows=False)
    with pytest.raises(RuntimeError, match="do not match"):
        layer(torch.ones(1, 512), None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 17, 33, 300])
def test_wide_linear_is_float32_on_the_stored_numbers(rows: int, dtype: torch.dtype) -> None:
    weight, bias, x = torch.randn(1030, 75).to(dtype), torch.randn(1030), random_rows(rows, 75)
    product = x.double() @ weight.double().t()
    # 75 products summed in some order: each addition rounds once.
    slack = 75 * unit(torch.float32) * (x.double().abs() @ weight.double().abs().t())
    got = kernels_ops.wide_linear(x, weight, bias)
    assert ((got.double() - product - bias.double()).abs() <= slack + 1e-6).all()
    assert torch.equal(kernels_ops.wide_linear(x[None], weight, bias)[0], got)


FLOATS = st.lists(st.floats(width=32, allow_nan=False, allow_subnormal=False), max_size=8)


@given(values=FLOATS, dtype=st.sampled_from((torch.bfloat16, torch.float16, torch.float32)))
def test_narrowest_changes_no_number(values: list[float], dtype: torch.dtype) -> None:
    weight = torch.tensor(values, dtype=torch.float32).to(dtype).float()
    narrow = kernels_ops.narrowest(weight)
    if narrow is None:
        assert dtype is torch.float32
        return
    assert narrow.element_size() == 2
    assert torch.equal(narrow.float(), weight)


def test_narrowest_picks_the_type_that_holds_the_numbers() -> None:
    kept = {
        (1.0, -0.5): torch.bfloat16,
        (1.0, 2.0**100): torch.bfloat16,  # past float16's range
        (1.0, 1 + 2.0**-10): torch.float16,  # past bfloat16's digits
        (1 + 2.0**-10, 2.0**100): None,
        (1.0, float("nan")): None,
    }
    for numbers, dtype in kept.items():
        narrow = kernels_ops.narrowest(torch.tensor(numbers))
        assert (None if narrow is None else narrow.dtype) is dtype, numbers
