"""How much a model's predictions suffer when layers are stored in one format or another.

KL(parent || quantized) is to second order half the square of what changes in the logits, in the
Fisher metric diag(p) - p p^T. A random vector of that covariance at every token, sent back through
the model once, gives a g for every unit's outputs at once: errors e of these outputs over a window
cost E (sum_t g_t . e_t)^2 / 2 nats. Blocks are read one at a time, once on the way forward and once
backward; in between only the states before each block are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean

import torch
from torch import Tensor, nn

from quant import formats
from quant.errors import SolveError
from quant.formats import FULL, Format
from quant.intake.source import Source
from quant.solver import blocks, descent, experts, gptq, int8, layers, smoothing, walk, weighting
from quant.solver.blocks import Decoder, Stream
from quant.solver.moments import Hessian
from quant.solver.walk import Group

_DRAWS = 4  # of the vectors sent back
_PROBED = 2  # formats of a unit whose errors are held against the gradients

Rows = Sequence[tuple[Tensor, Tensor]]  # input_ids and mask [1, length] of each window


@dataclass(frozen=True, slots=True)
class Offers:
    """The formats for a layer of so many inputs, and how it would be solved in them."""

    of_width: Callable[[int], Sequence[Format]]
    rounds_inputs: bool  # whether one of them has int8 inputs
    dtype: torch.dtype  # of scales
    damping: float


@dataclass(frozen=True, slots=True)
class Unit:
    """Layers that read the same input, which a server may load as one: they share a format.

    `smoothing` [columns] is what int8 inputs are divided by. `losses` are nats a token.
    """

    names: tuple[str, ...]
    smoothing: Tensor
    losses: dict[Format, float] = field(default_factory=dict)


def measure(
    decoder: Decoder, source: Source, rows: Rows, offers: Offers, told: Callable[[int, int], None]
) -> list[Unit]:
    """Every unit of the model, in its order, with what each format on offer would cost.

    `told` hears how many of how many steps are done.
    """
    decoder = replace(decoder, others=())  # a few windows, whose gradients go all the way back
    streams, probe = blocks.embed(decoder, source, rows)
    scout, depth = _Scout(offers), len(decoder.blocks)
    widths = formats.shared_widths(decoder.shapes())
    before, units = [], []
    for place in range(depth):
        before.append([stream.hidden for stream in streams])
        walk.run(decoder, place, source, (streams, probe), scout)
        units.append(scout.found())
        told(place + 1, 2 * depth)
    gradients = _behind_blocks(decoder, source, streams)
    for place in reversed(range(depth)):
        block = decoder.blocks[place]
        with blocks.filled(block, decoder.names(place), source, decoder.device):
            passes = [
                _backward(block, stream, place, hidden, gradient)
                for stream, hidden, gradient in zip(streams, before.pop(), gradients, strict=True)
            ]
            gradients = [each.before for each in passes]
            linears = blocks.linears(block)
            own = {decoder.home(place) + decoder.module(place, name): name for name in linears}
            for unit in units[place]:
                inside = {own[name]: linears[own[name]] for name in unit.names}
                _weigh(unit, inside, passes, offers, offers.of_width(widths[unit.names[0]]))
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
        weight = torch.cat([linear.weight for linear in group.linears.values()])
        divisor = torch.ones(weight.shape[1], device=weight.device)
        if self.scales_inputs:
            even = weighting.counted(group.inputs)
            divisor = smoothing.chosen(weight, group, even)
        names = tuple(f"{group.prefix}{name}" for name in group.linears)
        self._units.append(Unit(names, divisor))

    def found(self) -> list[Unit]:
        """The units noted since the last call."""
        units, self._units = self._units, []
        return units


def _behind_blocks(
    decoder: Decoder, source: Source, streams: Sequence[Stream]
) -> list[list[Tensor]]:
    """Of each stream, for each draw: the gradient where the last block ends."""
    draw = torch.Generator().manual_seed(0)
    with blocks.filled(decoder.model, _outside(decoder, source), source, decoder.device):
        return [_of_predictions(decoder, stream, draw) for stream in streams]


def _outside(decoder: Decoder, source: Source) -> dict[str, str]:
    """Norms and output head: own name -> the source's, the embedding's where they are tied."""
    embedding = decoder.model.get_input_embeddings()
    (table,) = (f"{n}.weight" for n, m in decoder.model.named_modules() if m is embedding)
    head = decoder.model.get_output_embeddings()
    found = {name: stored for name, stored in decoder.outside().items() if name != table}
    for name, module in decoder.model.named_modules():
        if module is head:
            for leaf, _ in module.named_parameters():
                stored = decoder.stored_as(f"{name}.{leaf}")
                tied = stored not in source.tensors
                found[f"{name}.{leaf}"] = decoder.stored_as(table) if tied else stored
    return found


def _of_predictions(decoder: Decoder, stream: Stream, draw: torch.Generator) -> list[Tensor]:
    """The model's own head, run on what the blocks put out, and back."""
    final = stream.hidden.detach().requires_grad_()
    with ExitStack() as undo, torch.enable_grad():
        for block in decoder.blocks:
            block.forward = lambda *_args, **_kwargs: final
            undo.callback(delattr, block, "forward")
        logits = decoder.model(inputs_embeds=stream.hidden, use_cache=False).logits
    root = logits.detach().float().softmax(dim=-1).sqrt_() * stream.mask[..., None]
    found = []
    for _ in range(_DRAWS):
        back = torch.randn(root.shape, generator=draw).to(root.device).mul_(root)
        back -= root.square().mul_(back.sum(dim=-1, keepdim=True))
        found.append(
            torch.autograd.grad(logits, final, back.to(logits.dtype), retain_graph=True)[0]
        )
    return found


@dataclass(frozen=True, slots=True)
class _Pass:
    """What each layer read [rows, columns] and the gradients of its outputs for each draw, of real
    tokens; the gradients of the block's own input; and the number of tokens."""

    read: Mapping[str, Tensor]
    outputs: Mapping[str, Sequence[Tensor]]
    before: list[Tensor]
    tokens: int


def _backward(
    block: nn.Module, stream: Stream, place: int, hidden: Tensor, gradients: Sequence[Tensor]
) -> _Pass:
    """One stream through one block, forward and back; experts see a sample of others' tokens too,
    for which their outputs' gradients are zero."""
    read: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}
    real: dict[str, Tensor] = {}
    args, kwargs = stream.calls[place]

    def note(_linear: nn.Module, inputs: tuple[Tensor], output: Tensor, *, name: str) -> None:
        real[name] = experts.real(experts.reading(inputs[0]), stream.mask)
        read[name], made[name] = inputs[0].detach()[real[name]], output

    start = hidden.detach().requires_grad_()
    with ExitStack() as undo, torch.enable_grad(), experts.sampling(block, walk.ONE_IN):
        for name, linear in blocks.linears(block).items():
            undo.callback(linear.register_forward_hook(partial(note, name=name)).remove)
        out = block(start, *args, **kwargs)
    end = out[0] if isinstance(out, tuple) else out
    wanted = [start, *made.values()]
    found = [torch.autograd.grad(end, wanted, one, retain_graph=True) for one in gradients]
    outputs = {
        name: [each[place][real[name]] for each in found] for place, name in enumerate(made, 1)
    }
    return _Pass(read, outputs, [each[0] for each in found], int(stream.mask.sum()))


def _weigh(
    unit: Unit,
    linears: Mapping[str, nn.Linear],
    passes: Sequence[_Pass],
    offers: Offers,
    forms: Sequence[Format],
) -> None:
    """Fills in what each format would cost a unit of these layers, by their names in the block."""
    weight = torch.cat([linear.weight for linear in linears.values()])
    first = next(iter(linears))
    inputs = [each.read[first] for each in passes]
    gradients = [
        [torch.cat([each.outputs[name][draw] for name in linears], dim=1) for draw in range(_DRAWS)]
        for each in passes
    ]
    try:
        own, moved = _moved(weight, unit.smoothing, (inputs, gradients), offers, forms)
    except SolveError as fault:
        raise SolveError(f"{' and '.join(unit.names)} could not be solved: {fault}") from fault
    rate = _rate(moved, sum(each.tokens for each in passes))
    unit.losses.update({form: rate * loss for form, loss in own.items()})


def _moved(
    weight: Tensor,
    smoothing: Tensor,
    windows: tuple[Sequence[Tensor], Sequence[Sequence[Tensor]]],
    offers: Offers,
    forms: Sequence[Format],
) -> tuple[dict[Format, float], list[tuple[float, list[Tensor]]]]:
    """The loss of each format for stacked layers, and of some of them also g . e [rows] of each
    window and draw, from the inputs [rows, columns] and the outputs' gradients of each window."""
    inputs, gradients = windows
    served = inputs
    if offers.rounds_inputs:
        served = [int8.as_served(rows / smoothing) for rows in inputs]
    hessian = Hessian(weight.shape[1], weight.device)
    for rows, even in zip(served, descent.evening(inputs), strict=True):
        hessian.add(rows * even)
    matrix, meant = hessian.mean(), [rows @ weight.T for rows in inputs]
    own: dict[Format, float] = {}
    moved: list[tuple[float, list[Tensor]]] = []
    for form in forms:
        if form == FULL:
            own[form] = 0.0
            continue
        factor = gptq.factorize(matrix, offers.damping, form.group)
        grid = layers.levels(form, offers.dtype)
        found = gptq.solve(weight * smoothing, matrix, factor, form.group, grid)
        own[form] = float(found.loss.sum())
        if len(moved) < _PROBED:
            errors = [s @ found.weight().T - m for s, m in zip(served, meant, strict=True)]
            pairs = zip(errors, gradients, strict=True)
            each = [(error * one).sum(dim=1) for error, drawn in pairs for one in drawn]
            moved.append((own[form], each))
    return own, moved


def _rate(moved: Sequence[tuple[float, Sequence[Tensor]]], tokens: int) -> float:
    """Nats a token for a unit's own loss: from loss and g . e [rows] of each window and draw.

    The mean of (sum_t g . e)^2 is right but one noisy number a window. Taken for independent, the
    tokens have a number each, but errors that many tokens share and attention sums up are missed:
    by how much, at least not at all, is a factor for the unit. Formats of a unit differ by the size
    of their errors, which the solver's loss tells exactly, so that a few of them tell the rate.
    """
    rates, shared = [], []
    for loss, windows in moved:
        alone = sum(float(each.square().sum()) for each in windows)
        if alone > 0 and loss > 0:
            rates.append(alone / loss / (tokens * _DRAWS) / 2)
            shared.append(sum(float(each.sum().square()) for each in windows) / alone)
    return fmean(rates) * max(fmean(shared), 1.0) if rates else 0.0
