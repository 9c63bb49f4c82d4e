"""How much a model's predictions suffer when layers are stored in one format or another.

Errors e of a layer's outputs cost E (g . e)^2 / 2 nats a token, where g is the gradient of what
`fisher` draws. A unit of layers is stored as some streams of text suggest, and judged on another.
Where the next layer adds to the stream of states, what counts is what is left there of the unit's
errors once that layer is aimed anew, as a run aims it. Blocks are read one at a time, once on the
way forward and once backward; in between only the states before each block are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from quant import formats
from quant.errors import SolveError
from quant.formats import FULL, Format
from quant.intake.source import Source
from quant.solver import (
    blocks,
    descent,
    fisher,
    gptq,
    int8,
    layers,
    smoothing,
    trial,
    walk,
    weighting,
)
from quant.solver.blocks import Decoder, Stream
from quant.solver.gptq import Solution
from quant.solver.moments import Hessian
from quant.solver.trial import Pass, Trial
from quant.solver.walk import Group

_FINER = 250  # times less is lost in 8 bits than in 4, in groups of the same size

Rows = Sequence[tuple[Tensor, Tensor]]  # input_ids and mask [rows, length] of each stream


@dataclass(frozen=True, slots=True)
class Offers:
    """The formats for each layer, smallest first, and how it would be solved in them."""

    of_layer: Mapping[str, Sequence[Format]]
    rounds_inputs: bool  # whether one of them has int8 inputs
    dtype: torch.dtype  # of scales
    damping: float

    def to(self, names: Sequence[str]) -> list[Format]:
        """The formats that all of these layers may have."""
        others = [self.of_layer[name] for name in names[1:]]
        return [form for form in self.of_layer[names[0]] if all(form in each for each in others)]


@dataclass(frozen=True, slots=True)
class Unit:
    """Layers that read the same input, which a server may load as one: they share a format.

    `smoothing` [columns] is what int8 inputs are divided by. `losses` are nats a token. It `adds`
    to the stream of states, or does not.
    """

    names: tuple[str, ...]
    smoothing: Tensor
    losses: dict[Format, float] = field(default_factory=dict)
    adds: bool = False


def measure(
    decoder: Decoder, source: Source, rows: Rows, offers: Offers, told: Callable[[int, int], None]
) -> list[Unit]:
    """Every unit of the model, in its order, with what each format on offer would cost on the first
    of the streams, if layers are stored as the others suggest.

    `told` hears how many of how many steps are done.
    """
    decoder = replace(decoder, others=())  # a few rows, whose gradients go all the way back
    streams, probe = blocks.embed(decoder, source, rows)
    scout, depth = _Scout(offers), len(decoder.blocks)
    before, units = [], []
    for place in range(depth):
        before.append([Stream(stream.hidden, stream.mask, stream.calls) for stream in streams])
        walk.run(decoder, place, source, (streams, probe), scout)
        units.append(scout.found())
        told(place + 1, 2 * depth)
    gradient = fisher.gradient(decoder, source, streams[0])
    for place in reversed(range(depth)):
        block, names = decoder.blocks[place], decoder.names(place)
        with blocks.filled(block, names, source, decoder.device, decoder.dtype):
            gradient = _weigh(decoder, place, units[place], (before.pop(), gradient), offers)
        told(2 * depth - place, 2 * depth)
    return together([unit for found in units for unit in found])


def together(units: Sequence[Unit]) -> list[Unit]:
    """The experts of a mixture, which a server loads in one format, as one unit."""
    found: dict[str, Unit] = {}
    for unit in units:
        home = formats.mixture(unit.names[0]) or unit.names[0]
        if (known := found.get(home)) is not None:
            losses = {form: loss + unit.losses[form] for form, loss in known.losses.items()}
            unit = replace(known, names=known.names + unit.names, losses=losses)
        found[home] = unit
    return list(found.values())


class _Scout:
    """A solver that changes nothing, and notes which layers read the same input."""

    def __init__(self, offers: Offers) -> None:
        self.scales_inputs = offers.rounds_inputs
        self._units: list[Unit] = []

    def seen(self, _linear: nn.Linear, inputs: Tensor) -> Tensor:
        return inputs

    def visit(self, group: Group) -> None:
        weight = torch.cat([linear.weight.float() for linear in group.linears.values()])
        divisor = torch.ones(weight.shape[1], device=weight.device)
        if self.scales_inputs:
            even = weighting.counted(group.inputs)
            divisor = smoothing.chosen(weight, group, even)
        names = tuple(f"{group.prefix}{name}" for name in group.linears)
        self._units.append(Unit(names, divisor, adds=group.inputs[0].gap is not None))

    def found(self) -> list[Unit]:
        """The units noted since the last call."""
        units, self._units = self._units, []
        return units


def _weigh(
    decoder: Decoder,
    place: int,
    units: Sequence[Unit],
    given: tuple[Sequence[Stream], Tensor],
    offers: Offers,
) -> Tensor:
    """Fills in what each format would cost the units of a block, `given` the streams before it and
    the gradient behind it for the first; returns that before it.

    A unit's formats differ by the size of their errors, which the solver's loss tells exactly, so
    that one of them tells what a loss costs.
    """
    block, (streams, gradient) = decoder.blocks[place], given
    again = [partial(trial.through, block, place, stream) for stream in streams]
    passes = [again[0](gradient), *(each() for each in again[1:])]
    linears = blocks.linears(block)
    inside = {decoder.home(place) + decoder.module(place, name): name for name in linears}
    trials = []
    for unit in units:
        its = {inside[name]: linears[inside[name]] for name in unit.names}
        trials.append(_tried(unit, its, passes[1:] or passes, offers))
    tokens = int(streams[0].mask.sum())
    for unit, felt in zip(units, trial.weighed(trials, passes, again, offers.damping), strict=True):
        own = next(iter(unit.losses.values()))
        rate = felt / tokens / 2 / own if own > 0 else 0.0
        unit.losses.update({form: rate * loss for form, loss in unit.losses.items()})
    assert passes[0].before is not None, "the first stream came back"
    return passes[0].before


def _tried(
    unit: Unit, linears: Mapping[str, nn.Linear], passes: Sequence[Pass], offers: Offers
) -> Trial:
    """A unit in its smallest format, fitted to what some passes read; notes what its own outputs
    lose in each."""
    weight = torch.cat([linear.weight.float() for linear in linears.values()])
    seen = partial(_rounded, by=unit.smoothing) if offers.rounds_inputs else nn.Identity()
    inputs = [each.read[next(iter(linears))] for each in passes]
    hessian = Hessian(weight.shape[1], weight.device)
    for rows, even in zip(inputs, descent.evening(inputs), strict=True):
        hessian.add((seen(rows) * even).to(rows.dtype))
    stored: list[Tensor] = []
    try:
        for form in offers.to(unit.names):
            finer = unit.losses.get(Format(4, form.group)) if form.bits == 8 else None
            if form == FULL:
                unit.losses[form] = 0.0
            elif finer is not None:
                unit.losses[form] = finer / _FINER
            else:
                found = _solved(weight * unit.smoothing, hessian, form, offers)
                unit.losses[form] = float(found.loss.sum())
                stored.append(found.weight())
    except SolveError as fault:
        raise SolveError(f"{' and '.join(unit.names)} could not be solved: {fault}") from fault
    return Trial(linears, weight, stored[0] if stored else weight, seen, unit.adds)


def _solved(weight: Tensor, hessian: Hessian, form: Format, offers: Offers) -> Solution:
    levels = layers.levels(form, offers.dtype)
    if hessian.is_dead():
        return gptq.rounded(weight, form.group, levels)
    factor = gptq.factorize(hessian.mean(), offers.damping, form.group)
    return gptq.solve(weight, hessian.mean(), factor, form.group, levels)


def _rounded(inputs: Tensor, by: Tensor) -> Tensor:
    """What a layer with int8 inputs computes with."""
    return int8.as_served(inputs / by)
