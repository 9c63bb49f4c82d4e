"""An adapter made ready to be served beside one base: plain, scaled, bound to it by fingerprint.

The engine multiplies by lora_alpha / r and pads every rank to the largest: here the scaling is
baked into B, all ranks are one, and lora_alpha is that rank. What an engine cannot add is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from quant import artifact, staging
from quant.artifact import Fingerprint
from quant.errors import AdapterError, ArtifactError, SpaceError
from quant.lora import adapter as lora
from quant.lora import fitting, merge, obstacles, starts, units, voice
from quant.lora.adapter import CONFIG, LINEAGE, WEIGHTS, Adapter


class Progress(Protocol):
    """Who is told how far it is."""

    def measured(self, name: str, done: int, total: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Order:
    """What to export for which base, to where; `dtype` None is the base's own.

    `initial` is the adapter that training started from, where it does not lie beside.
    """

    adapter: Path
    base: Path
    target: Path
    dtype: torch.dtype | None = None
    initial: Path | None = None


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


@dataclass(frozen=True, slots=True)
class Base:
    """A folder that adapters sit on. An artifact's parent is what they were trained on."""

    folder: Path
    parent: Fingerprint
    quantized: bool
    merged: tuple[str, ...]  # adapters that are part of its weights already
    artifact: str | None = None  # its identity
    units: Path | None = None  # what its layers read and put out, where not what the parent's do

    @property
    def dtype(self) -> torch.dtype:
        """What config.json says, where that is a 16-bit type; else bfloat16."""
        config = json.loads((self.folder / "config.json").read_bytes())
        named = str(config.get("dtype", config.get("torch_dtype"))).removeprefix("torch.")
        return torch.float16 if named == "float16" else torch.bfloat16


def base_of(folder: Path) -> Base:
    """ArtifactError for a folder that is no model, or that does not say what it was made from."""
    folder = folder.expanduser().resolve()
    if not (folder / "config.json").is_file():
        raise ArtifactError(f"{folder} is not a model folder: it has no config.json")
    manifest = artifact.read(folder)
    if manifest is not None:
        names = tuple(merged.name for merged in manifest.adapters)
        return Base(
            folder,
            manifest.parent,
            quantized=True,
            merged=names,
            artifact=lora.identity(manifest),
            units=lora.units(folder, manifest),
        )
    if artifact.quantization_config(folder) is not None:
        raise ArtifactError(
            f"{folder} is quantized and has no {artifact.MANIFEST} that names its parent: give the"
            " folder it was made from"
        )
    parent = Fingerprint(
        weights=artifact.weights_fingerprint(folder),
        tokenizer=artifact.tokenizer_fingerprint(folder),
    )
    return Base(folder, parent, quantized=False, merged=())


def run(order: Order, progress: Progress) -> Exported:
    """Writes the adapter and says what it is.

    AdapterError where it is no plain LoRA and cannot be made one, or does not fit the base. Any
    QuantError, and Ctrl-C, leave nothing at the target.
    """
    target = order.target.expanduser().absolute()
    staging.check_target(target, force=False)
    adapter = lora.read_trained(order.adapter)
    if order.initial is not None:
        adapter = replace(adapter, initial=order.initial.expanduser().resolve())
    _check_plain(adapter)
    base = base_of(order.base)
    _check_fits(adapter, base)
    dtype = order.dtype or base.dtype
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    # Exported before for this very artifact, it is in its units already.
    scales = units.read(base.units if adapter.artifact is None else None)
    for place, module in enumerate(adapter.pairs, 1):
        a, b = plain_pair(adapter, module, _weight(base, adapter, module))
        factors[module] = scales.moved(module, a, b)
        progress.measured(module, place, len(adapter.pairs))
    rank = max(len(a) for a, _ in factors.values())
    tensors = dict(_tensors(factors, rank, dtype))
    with staging.staged(target) as folder:
        try:
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
            _write_json(folder / CONFIG, _config(adapter, rank))
            _write_json(folder / LINEAGE, _lineage(adapter, base))
            for name in (n for n in voice.FILES if (adapter.folder / n).is_file()):
                shutil.copyfile(adapter.folder / name, folder / name)
        except OSError as fault:
            raise SpaceError(f"{folder} cannot hold the adapter: {fault}") from fault
    return Exported(
        folder=str(target),
        rank=rank,
        modules=len(factors),
        bytes=sum(tensor.nbytes for tensor in tensors.values()),
        dtype=str(dtype).removeprefix("torch."),
        base=base.parent.weights,
        start=adapter.config.start,
        travels=adapter.voice.told(),
        merged=base.merged,
    )


def plain_pair(adapter: Adapter, module: str, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] in float32 whose product is the module's whole change.

    Where the base was shifted before training that is s (B A - B0 A0), of twice the rank. `weight`
    is the base's, float32 [out, in], or None.
    """
    a, b = merge.pair(adapter, module)
    scale = lora.scaling(adapter.config, module)
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


def _check_fits(adapter: Adapter, base: Base) -> None:
    lora.validate(
        adapter,
        artifact.linear_shapes(base.folder),
        max_rank=None,
        base_weights_fingerprint=base.parent.weights,
        base_artifact=base.artifact,
    )
    fitting.fitted(adapter.voice, voice.vocabulary(base.folder), adapter.folder)
    reason = starts.why_not(adapter, has_base=not base.quantized)
    if reason is not None:
        raise AdapterError(
            f"{adapter.folder} is no change of its base: {reason} (--initial names it)",
            field="init_lora_weights",
        )
    for name, key in adapter.parts.copies.items():
        theirs = _stored(base, name)
        with safe_open(adapter.weights, framework="pt") as file:
            copy = file.get_tensor(key)
        if theirs is None or not torch.equal(copy.to(theirs.dtype), theirs):
            raise AdapterError(
                f"{adapter.folder} replaces {name} of the base; use `quantserve adapter merge`",
                field=key,
            )


def _weight(base: Base, adapter: Adapter, module: str) -> Tensor | None:
    """The base's weight as float32 [out, in], where a start has to be worked out from it."""
    if base.quantized or adapter.config.start is None or adapter.initial is not None:
        return None
    stored = _stored(base, f"{module}.weight")
    assert stored is not None  # its shape was compared
    upright = stored.T if lora.transposed(adapter, module) else stored
    return upright.to(torch.float32)


def _stored(base: Base, name: str) -> Tensor | None:
    header = artifact.headers(base.folder).get(name)
    if header is None:
        return None
    with safe_open(base.folder / header.file, framework="pt") as file:
        found: Tensor = file.get_tensor(name)
    return found


def _tensors(
    factors: dict[str, tuple[Tensor, Tensor]], rank: int, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for module, (a, b) in factors.items():
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


def _config(adapter: Adapter, rank: int) -> dict[str, Any]:
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
        "target_modules": sorted(adapter.pairs),
        "task_type": "CAUSAL_LM",
    }


def _lineage(adapter: Adapter, base: Base) -> dict[str, Any]:
    """In the parent's units it fits every artifact of the parent, else this one alone."""
    return {
        "format": 1,
        "base": base.parent.model_dump(),
        "artifact": base.artifact if base.units else None,
        "exported_from": {"name": adapter.name, "digest": adapter.digest},
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
