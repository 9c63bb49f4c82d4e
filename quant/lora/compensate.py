"""An adapter that also makes up for what quantization did to its base, in its own file.

Closed form, block by block: the change of every linear layer that gives it the outputs it has in
parent + adapter, on the inputs it will get beside the artifact, cut down to a rank. The blocks in
front have their corrections already. Refuses bases that are not quantized and ranks no engine
serves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from quant import artifact, calibration, checkpoint
from quant.errors import AdapterError, RecipeError, SolveError
from quant.intake import source
from quant.lora import factors, obstacles, units
from quant.lora.adapter import INPUT_DIVISOR, OUTPUT_DIVISOR, Adapter
from quant.lora.factors import Factors
from quant.lora.footing import Base
from quant.lora.training import Training
from quant.recipe import Recipe
from quant.solver import blocks, descent, devices, gptq, int8, lowrank, walk
from quant.solver.lowrank import Misses
from quant.solver.preflight import STREAM_TOKENS
from quant.solver.walk import Given, Group

_HELD = 8  # one in so many tokens is held out, to judge what the others suggest


class Progress(Protocol):
    """Who is told what happens."""

    def say(self, line: str) -> None: ...

    def measured(self, name: str, done: int, total: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Compensation:
    """How much rank beside the adapter's own, for which parent, on which rows.

    `texts` are lines of the adapter's domain; without them parent + adapter writes some.
    """

    rank: int
    parent: str
    rows: Recipe
    texts: Path | None = None
    cache: Path | None = None


def run(asked: Compensation, adapter: Adapter, base: Base, progress: Progress) -> Factors:
    """The factors of every linear layer in the blocks, and of what else the adapter changes.

    In the artifact's units. RecipeError, AdapterError.
    """
    _check(asked, adapter, base)
    device = devices.first(asked.rows.device)
    own = factors.of(adapter, base, lambda *_: None)
    progress.say(f"opening {asked.parent}")
    opened = source.open(
        asked.parent,
        adapters=[adapter.folder],
        training=Training(initial=adapter.initial),
        cache=asked.cache,
        say=progress.say,
    )
    if opened.fingerprint != base.parent:
        raise AdapterError(f"{asked.parent} is not what {base.folder} was made from")
    decoder = blocks.skeleton(opened, device)
    widths = (columns for _, columns in decoder.shapes().values())
    rows = calibration.prepare(opened, asked.rows, asked.texts, progress.say)
    rows = calibration.held_against(rows, widths, progress.say)
    solver = Compensator(base, own, adapter.rank + asked.rank, asked.rows.damping)
    together = max(1, STREAM_TOKENS[decoder.device.type] // rows.input_ids.shape[1])
    batches = zip(
        *(torch.split(each, together) for each in (rows.input_ids, rows.counted)), strict=True
    )
    streams = blocks.embed(decoder, opened, list(batches))
    for place in range(len(decoder.blocks)):
        walk.run(decoder, place, opened, streams, solver)
        progress.measured(f"block {place + 1}", place + 1, len(decoder.blocks))
    return own | solver.found


def _check(asked: Compensation, adapter: Adapter, base: Base) -> None:
    if base.artifact is None or not base.quantized:
        raise RecipeError(
            f"{base.folder} is not quantized, so there is nothing to compensate; leave it out"
        )
    if adapter.artifact is not None:
        raise AdapterError(
            f"{adapter.folder} was exported for an artifact; give the adapter that was trained"
        )
    if asked.rank < 1 or obstacles.served_rank(adapter.rank + asked.rank) is None:
        raise RecipeError(
            f"--compensate {asked.rank} beside the adapter's rank {adapter.rank}: together they may"
            f" be {obstacles.RANKS[-1]}, the most that vLLM serves, and at least 1 has to be added"
        )


class Compensator:
    """Chooses the change of every linear layer; `found` are its factors, in the artifact's units.

    Inside, inputs x / s are those of the artifact and outputs are the parent's.
    """

    scales_inputs = False

    def __init__(self, base: Base, own: Factors, rank: int, damping: float) -> None:
        self.found: Factors = {}
        self._base, self._own, self._rank, self._damping = base, own, rank, damping
        self._divisors: Mapping[str, Tensor] = units.read(base.units).divisors
        self._section = artifact.quantization_config(base.folder) or {}
        self._reads: dict[nn.Linear, tuple[Tensor | float, bool]] = {}

    def seen(self, linear: nn.Linear, inputs: Tensor) -> Tensor:
        """What a served layer computes with. That an adapter reads it before it is rounded is left
        out of the way on to the next layers: a rounding of a rounding error."""
        divisor, rounds = self._reads[linear]
        return int8.as_served(inputs / divisor) if rounds else inputs / divisor

    def visit(self, group: Group) -> None:
        """Sets the weights of layers that read the same input."""
        names = {f"{group.prefix}{name}": linear for name, linear in group.linears.items()}
        served = checkpoint.weights(self._base.folder, names)
        for name, linear in names.items():
            device = linear.weight.device
            form = artifact.format_of(self._base.folder, self._section, name)
            divisor = self._divisors.get(f"{name}.{INPUT_DIVISOR}", torch.ones(1)).to(device)
            self._reads[linear] = divisor, form.inputs == 8
            served[name] = served[name].to(device) * self._put(name, device)
        if all(given.routed is None for given in group.inputs):
            self._correct(names, served, group.inputs)
        else:  # an expert's own tokens are too few for more than the adapter itself
            self.found |= {name: self._own[name] for name in names if name in self._own}
        for name, linear in names.items():
            weight = served[name]
            if name in self.found:
                a, b = (factor.to(weight) for factor in self.found[name])
                weight += (b * self._put(name, weight.device)) @ a
            linear.weight.copy_(weight)

    def _correct(
        self,
        names: Mapping[str, nn.Linear],
        served: Mapping[str, Tensor],
        inputs: Sequence[Given],
    ) -> None:
        """Finds the factors of layers whose weights beside the artifact are `served`."""
        fitted, held = self._missing(names, served, inputs)
        divisor, _ = self._reads[next(iter(names.values()))]
        try:
            hessian, check = fitted.hessian(), held.hessian()
            factor = gptq.factorize(hessian, self._damping, -1)
        except SolveError as fault:
            raise SolveError(f"{min(names)} could not be compensated: {fault}") from fault
        start = 0
        for name, linear in names.items():
            rows = slice(start, start + linear.out_features)
            known = check, held.cross()[rows]
            plain = linear.weight * divisor - served[name]
            way = factor.solved(fitted.cross()[rows]) - plain
            choices = self._choices(name, lowrank.wanted(plain, way, known), hessian)
            a, b = min(choices, key=partial(lowrank.missed, held=known))
            self.found[name] = a.cpu(), (b / self._put(name, b.device)).cpu()
            start = rows.stop

    def _missing(
        self,
        names: Mapping[str, nn.Linear],
        served: Mapping[str, Tensor],
        inputs: Sequence[Given],
    ) -> tuple[Misses, Misses]:
        """What the layers' outputs, side by side, are missing on most tokens, and on those held
        out."""
        meant = torch.cat([linear.weight for linear in names.values()])
        stacked = torch.cat([served[name] for name in names])
        linear = next(iter(names.values()))
        divisor, _ = self._reads[linear]
        fitted, held = (Misses(len(meant), meant.shape[1], meant.device) for _ in range(2))
        evening = descent.evening(given.parent for given in inputs)
        for given, by in zip(inputs, evening, strict=True):
            read = given.served
            missing = given.parent @ meant.T - self.seen(linear, read) @ stacked.T
            read, missing = (read / divisor).mul_(by), missing.mul_(by)
            last = len(read) - len(read) // _HELD
            fitted.add(read[:last], missing[:last])
            held.add(read[last:], missing[last:])
        return fitted, held

    def _choices(self, name: str, change: Tensor, hessian: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The whole change fitted anew, and the adapter as it was with a fit of the rest."""
        anew = lowrank.fitted(change, hessian, self._rank)
        if name not in self._own:
            return [anew]
        a, b = (factor.to(change.device) for factor in self._own[name])
        b = b * self._put(name, change.device)
        more_a, more_b = lowrank.fitted(change - b @ a, hessian, self._rank - len(a))
        return [anew, (torch.cat([a, more_a]), torch.cat([b, more_b], dim=1))]

    def _put(self, name: str, device: torch.device) -> Tensor:
        """By what the artifact's outputs have to be multiplied, [out, 1] or [1, 1]."""
        return self._divisors.get(f"{name}.{OUTPUT_DIVISOR}", torch.ones(1)).to(device)[:, None]
