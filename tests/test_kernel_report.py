"""The report names what really computes a layer: ours, PyTorch's or vLLM's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from serve import kernel_report, kernels_native, kernels_ops
from serve.kernel_report import KernelReport, kernel_of
from serve.vllm_compat import layers_by_kernel


class Marlin:
    """As much of a kernel of vLLM's as has a name."""


def layer(**told: Any) -> nn.Module:
    made = nn.Linear(2, 2, dtype=torch.bfloat16)
    for name, value in {"quant_method": SimpleNamespace(), **told}.items():
        setattr(made, name, value)
    return made


def packed(path: str, bits: int, *, int8_rows: bool = False) -> kernels_ops.PackedLinear:
    codes, scales = torch.ones(16, 64, dtype=torch.int8), torch.ones(16, 1)
    make = kernels_ops.native if path == "native" else kernels_ops.aten
    return make(codes, scales, bits, int8_rows=int8_rows)


LEVEL = kernels_native.level()
KERNELS: dict[str, dict[str, Any]] = {
    f"W4A16 on {LEVEL} (quantserve)": {"packed": packed("native", 4)},
    f"W8A16 on {LEVEL} (quantserve)": {"packed": packed("native", 8)},
    f"W8A8 on {LEVEL} (quantserve)": {"packed": packed("native", 8, int8_rows=True)},
    "W4A16 (PyTorch)": {"packed": packed("aten", 4)},
    "W8A8 (PyTorch)": {"packed": packed("aten", 8, int8_rows=True)},
    f"experts of W4A16 on {LEVEL} (quantserve)": {"packed": [(packed("native", 4),) * 2]},
    "bfloat16 widened exactly (quantserve)": {"cpu_linear": kernels_ops.wide_linear},
    "vLLM's Marlin": {"quant_method": SimpleNamespace(kernel=Marlin())},
    "vLLM's Marlin, activations rounded to 8 bits": {
        "scheme": SimpleNamespace(kernel=Marlin()), "use_w4a8": True
    },
    "bfloat16 (vLLM's SimpleNamespace)": {},
    "": {"quant_method": None},
}  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_layer_is_told_by_what_computes_it(kernel: str) -> None:
    assert kernel_of(layer(**KERNELS[kernel])) == kernel


def test_layers_are_counted_once_where_a_head_is_tied() -> None:
    shared = layer()
    model = nn.ModuleDict({"embedding": shared, "head": shared, "norm": nn.LayerNorm(2)})

    class Worker(KernelReport):
        def get_model(self) -> nn.Module:
            return model

    told = getattr(Worker(), kernel_report.METHOD)()
    assert told == {"bfloat16 (vLLM's SimpleNamespace)": 1}


def test_ranks_that_are_alike_are_one_line() -> None:
    alike = [{"a": 1, "b": 7}] * 2
    assert kernel_report.line(alike) == "7 x b, 1 x a"
    assert kernel_report.line([{"a": 1}, {"b": 1}]) == "1 x a | 1 x b"
    assert kernel_report.line([]) == "unknown"


async def test_an_engine_that_cannot_tell_ends_nothing() -> None:
    async def collective_rpc(method: str, **_: Any) -> list[Any]:
        raise NotImplementedError(method)

    assert await layers_by_kernel(SimpleNamespace(collective_rpc=collective_rpc)) == []
