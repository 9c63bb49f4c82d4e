"""LoRA deltas added to a base weight in float32, whatever the files hold.

PEFT rounds twice to merge a bfloat16 model (the product in the adapter's dtype, the sum in the
base's). Here both happen in float32, and the float32 sum is what the solver sees.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from safetensors import safe_open
from torch import Tensor

from quant.adapter import Adapter, scaling


def merged_weight(weight: Tensor, adapters: Sequence[Adapter], module: str) -> Tensor:
    """W + sum of s B A over the adapters that hold `module`; float32, shaped as `weight`.

    `weight` is [out, in], or [in, out] where the adapters say fan_in_fan_out (Conv1D).
    """
    merged = weight.to(torch.float32, copy=True)
    for adapter in adapters:
        if module in adapter.pairs:
            merged += delta(adapter, module)
    return merged


def delta(adapter: Adapter, module: str) -> Tensor:
    """s B A of one module in float32, laid out like the base weight it is added to."""
    pair = adapter.pairs[module]
    with safe_open(adapter.weights, framework="pt") as file:
        a = file.get_tensor(pair.a_key).to(torch.float32)  # [rank, in]
        b = file.get_tensor(pair.b_key).to(torch.float32)  # [out, rank]
    product: Tensor = b @ a * scaling(adapter.config, module)
    return product.T if adapter.config.fan_in_fan_out else product
