"""Linear layers over packed integer weights, for any x86 CPU: packing at load, calls afterwards.

`pack` takes what every format unpacks to (signed codes and float32 scales) and returns a layer:
`NativeLinear` on our C++ kernels, `AtenLinear` on PyTorch's packed int4 matmul where those could
not be built. Also 16-bit float weights under float32 activations (`wide_linear`), which halves
the largest read of a small model, its output head. Knows nothing of vLLM.

Letters: M rows, N outputs, K inputs, G groups along K.

Accuracy against float32 arithmetic on the dequantized weights, as a ratio of norms: native 1e-4
(16-bit block floating point activations), PyTorch's 1e-2 (bfloat16 activations and scales).
Eight-bit activations are multiplied exactly by both; only the fallback rounds the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from serve import kernels_native

BLOCK = 16  # outputs per block, a fact of kernels_cpu.cpp
WIDEST = 256  # inputs that may share a 32-bit sum there
ROWS_NATIVE = 32  # up to here the 16-bit weight kernel beats widening a panel for sgemm
PANEL = 512  # outputs widened at a time: 512 x K floats stay near the core


@dataclass(frozen=True, slots=True)
class NativeLinear:
    codes: Tensor  # uint8, blocks as kernels_cpu.cpp reads them
    scale: Tensor  # float32 [N/16, 1 or chunks, 16]
    outputs: int
    bits: int
    width: int  # inputs per chunk
    per_token: bool  # activations as int8 with one scale per row, else 16 bits per chunk

    @property
    def kernel(self) -> str:
        return f"{_scheme(self.bits, self.per_token)} on {kernels_native.level()} (quantserve)"

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., K] in float32, bfloat16 or float16 -> [..., N] in the same dtype."""
        out: Tensor = torch.ops.quantserve.linear_int(
            x, self.codes, self.scale, bias, self.outputs, self.bits, self.width, self.per_token
        )
        return out


@dataclass(frozen=True, slots=True)
class AtenLinear:
    codes: Tensor  # PyTorch's int4 packing; eight bits are two nibbles side by side along K
    scale_and_zero: Tensor  # bfloat16 [G, N padded, 2]
    channel: Tensor | None  # float32 [N], for W8A8: too fine for bfloat16, so applied outside
    outputs: int
    group: int
    nibbles: int

    @property
    def kernel(self) -> str:
        return f"{_scheme(4 * self.nibbles, self.channel is not None)} (PyTorch)"

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        token = torch.ones(1)
        if self.channel is not None:
            rows, token = _to_int8(rows)
        rows = functional.pad(rows.bfloat16(), (0, -rows.shape[1] % self.group))
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows.repeat(1, self.nibbles), self.codes, self.group, self.scale_and_zero
        )[:, : self.outputs]
        if self.channel is not None:
            out = out.float() * token * self.channel
        if bias is not None:
            out = out + bias
        shaped: Tensor = out.to(x.dtype).view(*x.shape[:-1], self.outputs)
        return shaped


PackedLinear = NativeLinear | AtenLinear


def _scheme(bits: int, per_token: bool) -> str:  # noqa: FBT001
    return f"W{bits}A{8 if per_token else 16}"


def pack(codes: Tensor, scales: Tensor, bits: int, *, int8_rows: bool = False) -> PackedLinear:
    """codes: signed integers [N, K]; scales [N, G], G dividing K; int8_rows is W8A8 (G = 1)."""
    make = native if kernels_native.load() else aten
    return make(codes.to(torch.int8), scales.float(), bits, int8_rows=int8_rows)


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 words [N, K * bits / 32], lowest bits first -> signed codes [N, K]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)  # [N, words, codes per word]
    signed: Tensor = (codes - 2 ** (bits - 1)).flatten(1)
    return signed


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """float32 x [..., K] times bfloat16 or float16 weight [N, K], exactly widened -> [..., N]."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] <= ROWS_NATIVE and kernels_native.load():
        out: Tensor = torch.ops.quantserve.linear_wide(rows, weight)
    else:
        out = rows.new_empty(rows.shape[0], weight.shape[0])
        for first in range(0, weight.shape[0], PANEL):
            panel = weight[first : first + PANEL].float()
            torch.mm(rows, panel.t(), out=out[:, first : first + PANEL])
    if bias is not None:
        out += bias
    return out.view(*x.shape[:-1], weight.shape[0])


def narrowest(weight: Tensor) -> Tensor | None:
    """The same numbers in 16 bits, or None where that would change one of them."""
    for dtype in (torch.bfloat16, torch.float16):
        narrow = weight.to(dtype)
        if torch.equal(narrow.to(weight.dtype), weight):
            return narrow
    return None


def native(codes: Tensor, scales: Tensor, bits: int, *, int8_rows: bool) -> NativeLinear:
    outputs, inputs = codes.shape
    width = _chunk(inputs, scales.shape[1])
    padded = -(-outputs // BLOCK) * BLOCK
    offset = 8 if bits == 4 else 0  # nibbles are unsigned; the kernel takes the 8 off the sum
    table = torch.full((padded, -(-inputs // width) * width), offset, dtype=torch.int16)
    table[:outputs, :inputs] = codes.to(torch.int16) + offset
    blocks = table.view(padded // BLOCK, BLOCK, -1, 4, 2)  # [N/16, 16, K/8, nibble, parity]
    if bits == 4:
        parts = blocks.permute(0, 2, 1, 4, 3)
        words = parts[..., 0] | parts[..., 1] << 4 | parts[..., 2] << 8 | parts[..., 3] << 12
        packed = words.contiguous().view(torch.uint8)
    else:
        packed = blocks.permute(0, 2, 3, 1, 4).to(torch.int8).contiguous().view(torch.uint8)
    scale = functional.pad(scales, (0, 0, 0, padded - outputs))
    scale = scale.view(padded // BLOCK, BLOCK, -1).transpose(1, 2).contiguous()
    return NativeLinear(packed.flatten(), scale, outputs, bits, width, int8_rows)


def _chunk(inputs: int, groups: int) -> int:
    """Inputs per chunk: the weight group, or an even split of K when one scale covers it."""
    if groups > 1:
        return inputs // groups
    return -(-math.ceil(inputs / math.ceil(inputs / WIDEST)) // 8) * 8


def aten(codes: Tensor, scales: Tensor, bits: int, *, int8_rows: bool) -> AtenLinear:
    """Eight-bit codes are 16 * high + low: the same op on K high nibbles, then K low ones."""
    outputs, inputs = codes.shape
    group = inputs // scales.shape[1] if scales.shape[1] > 1 else 32
    channel = scales[:, 0] if int8_rows else None
    scale = torch.ones_like(scales) if int8_rows else scales
    scale = scale.expand(-1, -(-inputs // group)) if scales.shape[1] == 1 else scale
    codes = functional.pad(codes, (0, -inputs % group, 0, -outputs % BLOCK)).int()
    scale = functional.pad(scale, (0, 0, 0, -outputs % BLOCK)).t()  # [G, N]
    parts = [(codes + 8, scale, torch.zeros_like(scale))]
    if bits == 8:
        # The op computes (nibble - 8) * scale + zero; low nibbles are unsigned, so zero undoes it.
        parts = [((codes >> 4) + 8, 16 * scale, torch.zeros_like(scale)),
                 (codes & 15, scale, 8 * scale)]  # fmt: skip
    table = torch.cat([part[0] for part in parts], dim=1).contiguous()
    pairs = torch.cat([torch.stack(part[1:], dim=-1) for part in parts]).bfloat16().contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(table, 1)
    return AtenLinear(packed, pairs, channel, outputs, group, len(parts))


def _to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric dynamic quantization: integers in [-127, 127] and one scale per row [M, 1]."""
    rows = rows.float()
    most = rows.abs().amax(dim=1, keepdim=True)
    # A plain `127 / most` is 127 times the reciprocal, which rounds twice; 1 / 1e-38 overflows.
    inverse = torch.where(most > 1e-30, torch.full_like(most, 127) / most, 0)
    return (rows * inverse).round(), most / 127
