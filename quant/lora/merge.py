"""An adapter's change to one tensor of its base, in float32, whatever the files hold.

PEFT rounds twice to merge a bfloat16 model (the product in the adapter's dtype, the sum in the
base's). Here both happen in float32, and the float32 sum is what the solver sees.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from safetensors import safe_open
from torch import Tensor

from quant.errors import AdapterError
from quant.lora import starts
from quant.lora.adapter import Adapter, transposed


def touches(adapter: Adapter, name: str) -> bool:
    """True where merging changes the base's tensor `name`."""
    return name in adapter.parts.tensors()


def merged(stored: Tensor, adapters: Sequence[Adapter], name: str) -> Tensor:
    """The base's tensor `name` with the sum of the adapters' changes; float32, base's layout."""
    moving = [adapter for adapter in adapters if touches(adapter, name)]
    if len(moving) == 1:
        return alone(moving[0], stored, name)
    total = stored.to(torch.float32, copy=True)
    for adapter in moving:
        total += change(adapter, stored, name)
    return total


def change(adapter: Adapter, stored: Tensor, name: str) -> Tensor:
    """What `alone` adds to the tensor; float32, shaped as it. Zero where nothing is changed."""
    if is_plain(adapter, name):
        return delta(adapter, name.removesuffix(".weight"))
    if not touches(adapter, name):
        return torch.zeros_like(stored, dtype=torch.float32)
    after = alone(adapter, stored, name)
    if after.shape != stored.shape:
        raise AdapterError(
            f"adapter {adapter.folder} resizes {name}: it merges alone and whole, not with others",
            field=name,
            expected=str(list(stored.shape)),
            found=str(list(after.shape)),
        )
    return after - stored.float()


def is_plain(adapter: Adapter, name: str) -> bool:
    """True where the change is s B A and nothing else."""
    module, parts = name.removesuffix(".weight"), adapter.parts
    others = (parts.magnitudes, parts.rows)
    named = name in parts.whole or name in parts.copies
    return (
        f"{module}.weight" == name
        and module in parts.pairs
        and adapter.config.start is None
        and not named
        and not any(module in other for other in others)
    )


def alone(adapter: Adapter, stored: Tensor, name: str) -> Tensor:
    """The base's tensor `name` with this adapter merged; float32, in the base's layout.

    A resized embedding or head comes back in its new size. DoRA: m / |W + s B A| per row, times
    the sum (arXiv 2402.09353), where W is what training saw.
    """
    module, _, leaf = name.rpartition(".")
    parts = adapter.parts
    replaced = whole(adapter, name)
    weight = stored.to(torch.float32, copy=True) if replaced is None else replaced
    if leaf == "bias":
        if module in parts.offsets:
            weight += parts.pairs[module].scale * _tensor(adapter, parts.offsets[module])
        return weight
    if module in parts.pairs:
        weight = _adapted(adapter, module, weight)
    if module in parts.rows:
        key, indices = parts.rows[module]
        weight[list(indices)] = _tensor(adapter, key)
    return weight


def whole(adapter: Adapter, name: str) -> Tensor | None:
    """What the adapter puts in the tensor's place, in float32; None where it replaces nothing."""
    key = adapter.parts.whole.get(name, adapter.parts.copies.get(name))
    return None if key is None else _tensor(adapter, key)


def delta(adapter: Adapter, module: str) -> Tensor:
    """s B A of one module in float32, laid out like the base weight it is added to."""
    a, b = pair(adapter, module)
    product: Tensor = b @ a * adapter.pairs[module].scale
    return product.T if transposed(adapter, module) else product


def pair(adapter: Adapter, module: str) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] as saved, in float32; of a stack, one expert's."""
    found = adapter.pairs[module]
    if found.share is None:
        return _tensor(adapter, found.a_key), _tensor(adapter, found.b_key)
    expert, experts, first = found.share
    start = expert * found.rank
    with safe_open(adapter.weights, framework="pt") as file:
        a = file.get_slice(found.a_key)[start : start + found.rank]
        b = file.get_slice(found.b_key)[first : first + found.out_features]
    return a.float(), b[:, expert::experts].float()


def _adapted(adapter: Adapter, module: str, weight: Tensor) -> Tensor:
    turned = transposed(adapter, module)
    upright = weight.T if turned else weight  # [out, in]
    scale = adapter.pairs[module].scale
    if adapter.config.start is not None:
        a0, b0 = starts.factors(adapter, module, upright)
        upright = upright - scale * (b0 @ a0)
    a, b = pair(adapter, module)
    upright = upright + scale * (b @ a)
    if module in adapter.parts.magnitudes:
        magnitude = _tensor(adapter, adapter.parts.magnitudes[module])  # [out]
        upright = upright * (magnitude / upright.norm(dim=1))[:, None]
    return upright.T.contiguous() if turned else upright


def _tensor(adapter: Adapter, key: str) -> Tensor:
    with safe_open(adapter.weights, framework="pt") as file:
        found: Tensor = file.get_tensor(key)
    return found.to(torch.float32)
