"""An adapter as the two factors that an engine adds to each layer of one base.

Scaling is baked into B, a shifted start undone, a smoothed artifact's units met. Refuses what an
engine cannot add, and what does not fit the base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from safetensors import safe_open
from torch import Tensor

from quant import interrupt
from quant.errors import AdapterError
from quant.intake.source import Tensors
from quant.lora import adapter as lora
from quant.lora import fitting, merge, obstacles, placement, served, starts, units, voice
from quant.lora.adapter import Adapter
from quant.lora.footing import Base

Factors = dict[str, tuple[Tensor, Tensor]]  # by module: A [rank, in] and B [out, rank], float32
Told = Callable[[str, int, int], None]  # a module, how many are done, of how many


def of(adapter: Adapter, base: Base, told: Told) -> Factors:
    """Of every module of the adapter, for this base. AdapterError where it cannot be."""
    _check_plain(adapter)
    stored, shapes = Tensors(base.folder, base.headers), base.shapes()
    adapter = placement.beside(adapter, base.config, shapes)
    _check_fits(adapter, base, stored, shapes)
    # Exported before for this very artifact, it is in its units already.
    scales = units.read(base.units if adapter.artifact is None else None)
    found: Factors = {}
    for place, module in enumerate(adapter.pairs, 1):
        interrupt.check()
        a, b = plain_pair(adapter, module, _weight(base, stored, adapter, module))
        found[module] = scales.moved(module, a, b)
        told(module, place, len(adapter.pairs))
    return found


def plain_pair(adapter: Adapter, module: str, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] in float32 whose product is the module's whole change.

    Where the base was shifted before training that is s (B A - B0 A0), of twice the rank. `weight`
    is the base's, float32 [out, in], or None.
    """
    a, b = merge.pair(adapter, module)
    scale = adapter.pairs[module].scale
    if adapter.config.start is None:
        return a, scale * b
    a0, b0 = starts.factors(adapter, module, weight)
    return _refactored(torch.cat([a, a0]), scale * torch.cat([b, -b0], dim=1))


def _refactored(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of B A without the part that cancels.

    B0 A0 is as large as the base weight and the change is not: in 16 bits the difference of the two
    products would drown in their rounding, while factors of the difference keep their digits.
    """
    left, upper = torch.linalg.qr(b.double())
    right, lower = torch.linalg.qr(a.double().T)
    u, values, v = torch.linalg.svd(upper @ lower.T)
    rank = len(a)
    root = torch.zeros(rank, dtype=torch.float64)
    root[: len(values)] = values.sqrt()
    wide_a, wide_b = torch.zeros_like(a), torch.zeros_like(b)
    kept = len(values)
    wide_a[:kept] = (root[:kept, None] * (right @ v.T[:, :kept]).T).float()
    wide_b[:, :kept] = ((left @ u[:, :kept]) * root[:kept]).float()
    return wide_a, wide_b


def _check_plain(adapter: Adapter) -> None:
    for obstacle in obstacles.to_serving(adapter.config, adapter.parts):
        if obstacle.remedy == "merge":
            raise AdapterError(
                f"{adapter.folder} cannot be served beside its base: {obstacle.reason}; use"
                " `quantserve adapter merge`",
                field=obstacle.field,
            )


def _check_fits(
    adapter: Adapter, base: Base, stored: Tensors, shapes: Mapping[str, tuple[int, int]]
) -> None:
    lora.validate(
        adapter,
        shapes,
        max_rank=None,
        base_weights_fingerprint=base.parent.weights,
        base_artifact=base.artifact,
    )
    served.check(adapter.folder, adapter.pairs, served.targets(base.folder))
    fitting.fitted(adapter.voice, voice.vocabulary(base.folder), adapter.folder)
    reason = starts.why_not(adapter, has_base=not base.quantized)
    if reason is not None:
        raise AdapterError(
            f"{adapter.folder} is no change of its base: {reason} (--initial names it)",
            field="init_lora_weights",
        )
    for name, key in adapter.parts.copies.items():
        theirs = stored.get(name) if name in stored else None
        with safe_open(adapter.weights, framework="pt") as file:
            copy = file.get_tensor(key)
        if theirs is None or not torch.equal(copy.to(theirs.dtype), theirs):
            raise AdapterError(
                f"{adapter.folder} replaces {name} of the base; use `quantserve adapter merge`",
                field=key,
            )


def _weight(base: Base, stored: Tensors, adapter: Adapter, module: str) -> Tensor | None:
    """The base's weight as float32 [out, in], where a start has to be worked out from it."""
    if base.quantized or adapter.config.start is None or adapter.initial is not None:
        return None
    weight = stored.get(f"{module}.weight")
    upright = weight.T if lora.transposed(adapter, module) else weight
    return upright.to(torch.float32)
