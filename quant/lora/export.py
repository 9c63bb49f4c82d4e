"""An adapter made ready to be served beside one base: plain, scaled, bound to it by fingerprint.

The engine multiplies by lora_alpha / r and pads every rank to the largest: here the scaling is
baked into B, all ranks are one, and lora_alpha is that rank. What an engine cannot add is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from quant import companions, paths, staging
from quant.errors import AdapterError, SpaceError
from quant.lora import adapter as lora
from quant.lora import compensate, factors, footing, training, voice
from quant.lora.adapter import CONFIG, LINEAGE, WEIGHTS, Adapter
from quant.lora.compensate import Compensation
from quant.lora.factors import Factors
from quant.lora.footing import Base


class Progress(Protocol):
    """Who is told how far it is."""

    def say(self, line: str) -> None: ...

    def measured(self, name: str, done: int, total: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Order:
    """What to export for which base, to where; `dtype` None is the base's own.

    `initial` is the adapter that training started from, where it does not lie beside. `cache` keeps
    a base that had to be converted.
    """

    adapter: Path
    base: Path
    target: Path
    dtype: torch.dtype | None = None
    initial: Path | None = None
    compensation: Compensation | None = None
    cache: Path | None = None


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written; `start` is what was undone on the way, `base` the parent's fingerprint."""

    folder: str
    rank: int
    modules: int
    bytes: int
    dtype: str
    base: str
    start: str | None
    travels: tuple[str, ...]
    merged: tuple[str, ...]

    def told(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def run(order: Order, progress: Progress) -> Exported:
    """Writes the adapter and says what it is.

    AdapterError where it is no plain LoRA and cannot be made one, or does not fit the base. Any
    QuantError, and an interrupt, leave nothing at the target.
    """
    target = paths.full(order.target).absolute()
    staging.check_target(target, force=False)
    adapter = lora.read_trained(order.adapter)
    if order.initial is not None:
        adapter = training.started(adapter, order.initial)
    base = footing.base_of(order.base, order.cache, progress.say)
    if order.compensation is None:
        found = factors.of(adapter, base, progress.measured)
    else:
        found = compensate.run(order.compensation, adapter, base, progress)
    rank = max(len(a) for a, _ in found.values())
    dtype = order.dtype or base.dtype
    tensors = dict(_tensors(found, rank, dtype))
    with staging.staged(target) as folder:
        try:
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
            _write_json(folder / CONFIG, _config(adapter, rank, sorted(found)))
            bound = base.units is not None or order.compensation is not None
            _write_json(folder / LINEAGE, _lineage(adapter, base, bound=bound))
            companions.copy(adapter.folder, folder, tuple(voice.FILES))
        except OSError as fault:
            raise SpaceError(f"{folder} cannot hold the adapter: {fault}") from fault
    return Exported(
        folder=str(target),
        rank=rank,
        modules=len(found),
        bytes=sum(tensor.nbytes for tensor in tensors.values()),
        dtype=str(dtype).removeprefix("torch."),
        base=base.parent.weights,
        start=adapter.config.start,
        travels=adapter.voice.told(),
        merged=base.merged,
    )


def _tensors(found: Factors, rank: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for module, (a, b) in found.items():
        missing = rank - len(a)
        padded = {
            "A": torch.nn.functional.pad(a, (0, 0, 0, missing)),  # [rank, in]
            "B": torch.nn.functional.pad(b, (0, missing)),  # [out, rank]
        }
        for side, tensor in padded.items():
            written = tensor.to(dtype).contiguous()
            if not bool(torch.isfinite(written).all()):
                raise AdapterError(
                    f"{module} is not finite in {str(dtype).removeprefix('torch.')} once scaled;"
                    " --dtype bfloat16 holds it",
                    field=module,
                )
            yield f"base_model.model.{module}.lora_{side}.weight", written


def _config(adapter: Adapter, rank: int, modules: list[str]) -> dict[str, Any]:
    return {
        "base_model_name_or_path": adapter.config.base_model_name_or_path,
        "bias": "none",
        "fan_in_fan_out": adapter.config.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "peft_type": "LORA",
        "r": rank,
        # Whole names: a bare tail would put empty pairs on layers that were not trained.
        "target_modules": modules,
        "task_type": "CAUSAL_LM",
    }


def _lineage(adapter: Adapter, base: Base, *, bound: bool) -> dict[str, Any]:
    """A change of the parent itself fits every artifact of it, else this one alone."""
    return {
        "format": 1,
        "base": base.parent.model_dump(),
        "artifact": base.artifact if bound else None,
        "exported_from": {"name": adapter.name, "digest": adapter.digest},
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
