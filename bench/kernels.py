"""Our packed linear layers beside PyTorch's, per call and as ratios within one run.

Every figure is the time of bfloat16 `F.linear` or float32 `F.linear` on the same shape divided by
the time of the packed layer: above 1 the packed layer is faster. Activations are float32, what we
serve in where there is no native bfloat16; PyTorch's packed int4 kernel gets bfloat16, the only
type it is fast in. `limit` is the time of one row when reading the weights at this machine's
measured bandwidth costs everything; a small layer stays in a cache and may beat it.

    python -m bench.kernels                # as this machine
    python -m bench.kernels --isa avx2     # as an AVX2 machine
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from bench.lora import alternate
from bench.serve import AVX2
from serve import kernels_native, kernels_ops

SHAPES = ((576, 1536), (2048, 2048), (2048, 8192))  # N x K
ROWS = (1, 8, 64, 256)
GROUP = 64
BITS_READ = {"int4": 4 + 32 / GROUP, "int8": 8}  # codes, and float32 scales
STREAM_BYTES = 1 << 28  # past every cache


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", choices=["auto", "avx2"], default="auto")
    asked = parser.parse_args()
    if asked.isa == "avx2" and not AVX2.items() <= os.environ.items():
        # torch, oneDNN and MKL read their limits once, when they start: start again.
        command = [sys.executable, "-m", "bench.kernels", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **AVX2})
    torch.set_num_threads(asked.threads)
    with torch.inference_mode():
        bandwidth = _bandwidth()
        print(f"{kernels_native.level()}, {torch.get_num_threads()} threads, memory "
              f"{bandwidth / 1e9:.1f} GB/s, groups of {GROUP}")  # fmt: skip
        print("    N x K       M | bf16 us  int4  int8  W8A8 aten4"
              " | fp32 us  int4  int8  W8A8 aten4 | int4 us limit | int8 us limit")  # fmt: skip
        for outputs, inputs in SHAPES:
            layers = _layers(outputs, inputs)
            for rows in ROWS:
                _line((outputs, inputs, rows), layers, bandwidth)


def _line(
    shape: tuple[int, int, int], layers: dict[str, kernels_ops.PackedLinear], bandwidth: float
) -> None:
    outputs, inputs, rows = shape
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    narrow_x, narrow = x.bfloat16(), weight.bfloat16()
    calls: list[Callable[[], object]] = [
        partial(functional.linear, narrow_x, narrow),
        partial(functional.linear, x, weight),
        *(
            partial(layer, narrow_x if name == "aten4" else x, None)
            for name, layer in layers.items()
        ),
    ]
    bf16, fp32, *packed = alternate(calls)
    cells = [f"{outputs:5} x {inputs:<5} {rows:4}"]
    for base in (bf16, fp32):
        cells.append(f"{base * 1e6:7.0f} " + " ".join(f"{base / each:5.2f}" for each in packed))
    for name, seconds in zip(("int4", "int8"), packed, strict=False):
        limit = outputs * inputs * BITS_READ[name] / 8 / bandwidth
        bound = f" {limit * 1e6:5.0f}" if rows == 1 else ""
        cells.append(f"{seconds * 1e6:7.0f}{bound:6}")
    print(" | ".join(cells), flush=True)


def _layers(outputs: int, inputs: int) -> dict[str, kernels_ops.PackedLinear]:
    grouped, channel = torch.rand(outputs, inputs // GROUP) / 8, torch.rand(outputs, 1) / 128
    int4, int8 = _codes(4, (outputs, inputs)), _codes(8, (outputs, inputs))
    return {
        "int4": kernels_ops.pack(int4, grouped, 4),
        "int8": kernels_ops.pack(int8, channel, 8),
        "W8A8": kernels_ops.pack(int8, channel, 8, int8_rows=True),
        "aten4": kernels_ops.aten(int4.to(torch.int8), grouped, 4, int8_rows=False),
    }


def _codes(bits: int, shape: tuple[int, int]) -> Tensor:
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape)


def _bandwidth() -> float:
    """Bytes per second that all threads together read from memory: the best of a few sums."""
    block = torch.zeros(STREAM_BYTES // 4)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        block.sum()
        best = min(best, time.perf_counter() - began)
    return STREAM_BYTES / best


if __name__ == "__main__":
    main()
