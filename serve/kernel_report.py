"""Which kernel computes each layer, by what the loaded model has: ours, PyTorch's, or vLLM's.

`KernelReport` is vLLM's `--worker-extension-cls`: its method becomes one of the engine's workers',
where the model is, and the API process calls it by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from serve import kernels_ops

CLASS = "serve.kernel_report.KernelReport"
METHOD = "quantserve_kernels"


class KernelReport:
    """Mixed into vLLM's worker."""

    def quantserve_kernels(self) -> dict[str, int]:
        """How many layers each kernel computes; `get_model` is the worker's."""
        model: nn.Module = self.get_model()  # type: ignore[attr-defined]
        return dict(Counter(kernel for layer in model.modules() if (kernel := kernel_of(layer))))


def kernel_of(layer: nn.Module) -> str:
    """What computes a layer that holds weights of its own; empty for every other module."""
    told: dict[str, Any] = vars(layer)
    method = told.get("quant_method")
    if method is None:
        return ""
    packed = told.get("packed")
    if isinstance(packed, list):  # experts: gate and up, and down, of each
        return f"experts of {packed[0][0].kernel}"
    if packed is not None:
        return str(packed.kernel)
    if told.get("cpu_linear") is kernels_ops.wide_linear:
        return f"{_dtype(layer)} widened exactly (quantserve)"
    kernel = getattr(method, "kernel", None) or getattr(told.get("scheme"), "kernel", None)
    if kernel is None:
        return f"{_dtype(layer)} (vLLM's {type(method).__name__})"
    rounded = ", activations rounded to 8 bits" if told.get("use_w4a8") else ""
    return f"vLLM's {type(kernel).__name__}{rounded}"


def _dtype(layer: nn.Module) -> str:
    weight = next(layer.parameters(recurse=False), None)
    return "no weights" if weight is None else str(weight.dtype).removeprefix("torch.")


def line(ranks: Sequence[Mapping[str, int]]) -> str:
    """One for an operator: every kernel, most layers first; ranks that are alike are told once."""
    texts = [
        ", ".join(f"{count} x {kernel}" for kernel, count in Counter(rank).most_common())
        for rank in ranks
    ]
    return " | ".join(dict.fromkeys(texts)) or "unknown"
