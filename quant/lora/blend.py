"""One or several adapters merged into a plain model folder, a tensor at a time.

Reads a base as `quantize` does, computes every change in float32 and rounds once, to the dtype that
is written. Keeps one tensor and its changes in memory.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from quant import checkpoint, interrupt, paths, staging
from quant.errors import AdapterError, RecipeError, SpaceError
from quant.intake import remodel, source
from quant.intake.source import Source
from quant.lora import adapter as lora
from quant.lora import anatomy, mixture, placement
from quant.lora.adapter import Adapter
from quant.lora.anatomy import Anatomy, Plan
from quant.lora.mixture import Mixer, Mixture
from quant.lora.training import AS_STORED, Training
from quant.shards import Writer

_MARGIN = 32 << 20  # bytes beside the tensors: tokenizer, configuration, headers


class Progress(Protocol):
    """Who is told what happens."""

    def say(self, line: str) -> None: ...

    def measured(self, name: str, done: int, total: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Order:
    """What to merge into what, from where to where; `dtype` None is the base's own."""

    base: str
    target: Path
    adapters: tuple[Path, ...]
    mixture: Mixture
    training: Training = AS_STORED
    dtype: torch.dtype | None = None
    cache: Path | None = None


@dataclass(frozen=True, slots=True)
class Blended:
    """What was written; `vocabulary` is the new number of rows, where it changed."""

    folder: str
    tensors: int
    changed: int
    bytes: int
    untied: bool
    vocabulary: int | None

    def told(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@dataclass(slots=True)
class _Job:
    opened: Source
    anatomy: Anatomy
    plan: Plan
    adapters: tuple[Adapter, ...]
    order: Order
    progress: Progress
    done: int = 0

    def names(self) -> list[str]:
        return remodel.names(self.anatomy, self.plan, self.opened.tensors.names())

    def total(self) -> int:
        trimmed = sum(len(adapter.parts.tensors()) for adapter in self.adapters)
        return len(self.names()) + trimmed * mixture.passes(self.order.mixture)

    def tell(self, name: str) -> None:
        self.done += 1
        self.progress.measured(name, self.done, self.total())

    def stored(self, name: str) -> Tensor:
        """The tensor that training started from."""
        return self.opened.tensors.get(self._kept(name))

    def dtype(self, name: str) -> torch.dtype:
        return self.order.dtype or self.opened.tensors.stored_dtype(self._kept(name))

    def _kept(self, name: str) -> str:
        """Where the base keeps it: a tied head is its embedding."""
        tied = self.anatomy.tied and name == self.anatomy.head
        return self.anatomy.embedding if tied else name


def run(order: Order, progress: Progress) -> Blended:
    """Writes the merged model and says what it is.

    Any QuantError, and an interrupt, leave neither a target nor a partial one behind.
    """
    target = paths.full(order.target).absolute()
    staging.check_target(target, force=False)
    adapters = _opened(order)
    progress.say(f"opening {order.base}")
    opened = source.open(order.base, training=order.training, cache=order.cache, say=progress.say)
    job = _job(order, opened, adapters, progress)
    width = (order.dtype or opened.dtype).itemsize
    staging.check_space(target.parent, opened.bytes * width // opened.dtype.itemsize + _MARGIN)
    with staging.staged(target) as folder:
        mixer = mixture.mixer(order.mixture, job.adapters, job.stored, job.tell)
        writer = Writer(folder)
        for name in job.names():
            interrupt.check()
            job.tell(name)
            writer.add(name, _written(job, mixer, name))
        size = writer.close()
        try:
            checkpoint.copy_companions(opened.folder, folder)
            files = remodel.copy_tokenizer(job.plan, adapters, folder)
            if job.plan.vocabulary is None:
                rows = opened.tensors.shape(job.anatomy.embedding)[0]
                remodel.copy_voice(adapters, rows, folder)
            remodel.write_config(opened.folder, folder, job.plan, order.dtype)
        except OSError as fault:
            raise SpaceError(f"{folder} cannot hold what belongs to the model: {fault}") from fault
    if job.plan.vocabulary is not None and not files:
        progress.say("the vocabulary changed and no adapter brings a tokenizer: the base's is kept")
    changed = frozenset().union(*(adapter.parts.tensors() for adapter in job.adapters))
    return Blended(
        folder=str(target),
        tensors=len(job.names()),
        changed=len(changed),
        bytes=size,
        untied=job.plan.untie,
        vocabulary=job.plan.vocabulary,
    )


def _opened(order: Order) -> tuple[Adapter, ...]:
    if not order.adapters:
        raise RecipeError("--adapter: at least one is needed")
    return order.training.adapters(order.adapters)


def _job(order: Order, opened: Source, adapters: tuple[Adapter, ...], progress: Progress) -> _Job:
    known = opened.fingerprint.weights
    for adapter in adapters:
        lora.check_lineage(adapter, known)
    shapes = {name: opened.tensors.shape(name) for name in opened.tensors.names()}
    parts = anatomy.of(opened.config, shapes)
    placed = tuple(placement.placed(adapter, parts.names) for adapter in adapters)
    return _Job(opened, parts, anatomy.plan(parts, shapes, placed), placed, order, progress)


def _written(job: _Job, mixer: Mixer, name: str) -> Tensor:
    mixed = mixer.mixed(job.stored(name), name)
    written = mixed.to(job.dtype(name))
    if not bool(torch.isfinite(written).all()):
        raise AdapterError(
            f"{name} is not finite in {str(written.dtype).removeprefix('torch.')} once merged;"
            " --dtype float32 holds it, or a smaller weight",
            field=name,
        )
    return written
