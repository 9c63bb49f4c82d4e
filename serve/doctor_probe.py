"""The child of `quantserve doctor` that asks torch: which kernels, how fast, which devices.

A process of its own, for a torch that crashes is something to report. Writes a JSON object as the
last line of its standard output. Compiles nothing.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import serve.isa  # noqa: F401 - acts on import, before anything asks torch
from quant.solver import devices
from serve import kernels_native, kernels_ops
from serve.kernels_ops import PackedLinear

SCHEMES = ((4, False), (8, False), (8, True))  # bits, and whether activations have eight too
SIZE = 2048  # inputs and outputs of the layer that is timed
TIMED_S = 0.1


class _Said(logging.Handler):
    """Keeps what the kernels' loader warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def look() -> dict[str, Any]:
    """`serve.doctor.Kernels` as a dict."""
    said = _Said()
    kernels_native.logger.addHandler(said)
    level, library = kernels_native.level(), ""
    if level is not None:
        try:
            library = str(kernels_native.place(level))
        except kernels_native.BuildError as fault:
            said.lines.append(str(fault))
    compiled = Path(library).is_file()
    loads = compiled and kernels_native.load()
    cpu = torch.device("cpu")
    return {
        "level": level,
        "library": library,
        "compiled": compiled,
        "fault": "; ".join(said.lines),
        "products": list(_products(native=loads or (library != "" and not compiled), there=loads)),
        "quantize_dtype": str(devices.forward_dtype(cpu, exact=False)).removeprefix("torch."),
        "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _products(*, native: bool, there: bool) -> Iterator[dict[str, Any]]:
    """Each scheme's layer as it will be; timed where its kernel is `there` already."""
    make = kernels_ops.native if native else kernels_ops.aten
    codes = torch.randint(-8, 8, (SIZE, SIZE), dtype=torch.int8)
    for bits, int8_rows in SCHEMES:
        scales = torch.ones(SIZE, 1 if int8_rows else SIZE // 64)
        layer = make(codes, scales, bits, int8_rows=int8_rows)
        timed = _weights_per_s(layer) if there or not native else None
        yield {"kernel": layer.kernel, "weights_per_s": timed}


def _weights_per_s(layer: PackedLinear) -> float:
    row = torch.randn(1, SIZE)
    layer(row, None)  # which starts the threads
    began, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < TIMED_S:
        layer(row, None)
        count += 1
    return count * SIZE * SIZE / passed


if __name__ == "__main__":
    sys.stdout.write(json.dumps(look()) + "\n")
