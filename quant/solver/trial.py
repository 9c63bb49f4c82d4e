"""Layers of one block stored in fewer bits for a trial, and how much the predictions feel of it.

Knows streams before the block, and of one of them the gradient of something behind it. That one
judges; what is stored, and what makes up for it, is fitted to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile

import torch
from torch import Tensor, nn
from torch.nn import functional

from quant import interrupt
from quant.solver import blocks, descent, experts, gptq, moments, walk
from quant.solver.blocks import Stream
from quant.solver.moments import Moments
from quant.solver.preflight import HELD


@dataclass(frozen=True, slots=True)
class Pass:
    """One stream through one block: what each layer `read` of real tokens [tokens, columns] and
    what it `made` of all. Where it came back as well, the gradients of what was made of real tokens
    [tokens, outputs], and of the block's own input."""

    read: Mapping[str, Tensor]
    made: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    before: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Trial:
    """Layers that read the same input, by their names in the block, stacked: `weight` [rows,
    columns], as they are `stored`, and what they would compute with of the inputs `seen`. They
    `add` to the stream of states, or do not."""

    linears: Mapping[str, nn.Linear]
    weight: Tensor
    stored: Tensor
    seen: Callable[[Tensor], Tensor]
    adds: bool

    def read(self, on: Pass) -> Tensor:
        return on.read[next(iter(self.linears))]

    def gradient(self, on: Pass) -> Tensor:
        return torch.cat([on.gradients[name] for name in self.linears], dim=1)


def through(
    block: nn.Module,
    place: int,
    stream: Stream,
    gradient: Tensor | None = None,
    instead: Mapping[str, Tensor] | None = None,
) -> Pass:
    """Forward, and back from a gradient of what comes out; layers put out something else `instead`.

    Experts read a sample of others' tokens too, with gradients of zero.
    """
    read: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}
    real: dict[str, Tensor] = {}
    args, kwargs = stream.calls[place]

    def note(_: nn.Module, inputs: tuple[Tensor], output: Tensor, *, name: str) -> Tensor | None:
        interrupt.check()
        real[name] = experts.real(experts.reading(inputs[0]), stream.mask)
        read[name], made[name] = inputs[0].detach()[real[name]], output
        return (instead or {}).get(name)

    start, back = stream.hidden.detach(), gradient is not None
    start.requires_grad_(back)
    with ExitStack() as undo, torch.set_grad_enabled(back), experts.sampling(block, walk.ONE_IN):
        for name, linear in blocks.linears(block).items():
            undo.callback(linear.register_forward_hook(partial(note, name=name)).remove)
        out = block(start, *args, **kwargs)
    if not back:
        return Pass(read, made)
    end = out[0] if isinstance(out, tuple) else out
    before, *found = torch.autograd.grad(end, [start, *made.values()], gradient)
    gradients = {name: each[real[name]] for name, each in zip(made, found, strict=True)}
    return Pass(read, {name: each.detach() for name, each in made.items()}, gradients, before)


def weighed(
    trials: Sequence[Trial],
    passes: Sequence[Pass],
    again: Sequence[Callable[..., Pass]],
    damping: float,
) -> list[float]:
    """Of each trial the sum of (g . e)^2 over the first pass's tokens.

    e is what is wrong with its layers' outputs; of what comes right before layers that add to the
    stream, what is wrong with theirs once they are aimed anew. `again` repeats each pass.
    """
    adders = {name for trial in trials if trial.adds for name in trial.linears}
    behind = [_behind(trials, place) for place in range(len(trials))]
    with _served([trial for trial, found in zip(trials, behind, strict=True) if found]):
        moved = [
            repeat(instead={name: each.made[name] for name in adders})
            for repeat, each in zip(again, passes, strict=True)
        ]
    return [
        float(_felt(trial, found, (passes, moved), damping).square().sum())
        for trial, found in zip(trials, behind, strict=True)
    ]


def _felt(
    trial: Trial,
    adders: Sequence[Trial],
    known: tuple[Sequence[Pass], Sequence[Pass]],
    damping: float,
) -> Tensor:
    """g . e [tokens] of a trial with these layers behind it; `known` are the parent's passes and
    those through what is served."""
    judge, moved = known[0][0], known[1][0]
    if not adders:
        return _moved(trial, trial.stored, trial.seen(trial.read(judge)), judge)
    pairs = list(zip(*known, strict=True))
    parts = []
    for adder in adders:
        reads = [(adder.read(parent), adder.read(served)) for parent, served in pairs[1:] or pairs]
        weight = aimed(adder.weight, reads, damping)
        parts.append(_moved(adder, weight, adder.read(moved), judge))
    return torch.stack(parts).sum(dim=0)


def _moved(layer: Trial, weight: Tensor, served: Tensor, judge: Pass) -> Tensor:
    """g . e [tokens] of a layer with another weight and inputs; tokens of huge inputs count for no
    more than they do to the solver, which makes up for their errors in the blocks behind."""
    parent = layer.read(judge)
    error = served.float() @ weight.T - parent.float() @ layer.weight.T
    (even,) = descent.evening([parent])
    return (error.mul_(even) * layer.gradient(judge)).sum(dim=1)


def _behind(trials: Sequence[Trial], place: int) -> list[Trial]:
    """The layers right behind a trial's that add to the stream, as it does not itself: all that it
    does to the stream goes through those."""
    if trials[place].adds:
        return []
    return list(takewhile(lambda trial: trial.adds, trials[place + 1 :]))


@contextmanager
def _served(trials: Sequence[Trial]) -> Iterator[None]:
    """Their layers compute as they are stored."""

    def compute(inputs: Tensor, *, trial: Trial, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(trial.seen(inputs).to(inputs.dtype), weight.to(inputs.dtype), bias)

    with ExitStack() as undo:
        for trial in trials:
            layers = list(trial.linears.values())
            parts = torch.split(trial.stored, [linear.out_features for linear in layers])
            for linear, weight in zip(layers, parts, strict=True):
                instead = partial(compute, trial=trial, weight=weight, bias=linear.bias)
                linear.forward = instead  # type: ignore[method-assign] # undone right below
                undo.callback(delattr, linear, "forward")
        yield


def aimed(weight: Tensor, reads: Sequence[tuple[Tensor, Tensor]], damping: float) -> Tensor:
    """The weight [rows, columns] of a layer as a run changes it for what it reads of each stream
    [tokens, columns], in the parent and when served."""
    even = descent.evening(parent for parent, _ in reads)
    known, held = Moments(weight), moments.Sample(weight, sum(len(by) // HELD for by in even))
    for (parent, served), by in zip(reads, even, strict=True):
        rows = [(each * by).to(each.dtype) for each in (served, parent)]
        last = len(by) - len(by) // HELD
        known.add(*(each[:last] for each in rows))
        held.add(*(each[last:] for each in rows))
    if known.hessian.is_dead():
        return weight
    factor = gptq.factorize(known.hessian.mean(), damping, -1)
    return descent.shifted(weight, weight, known.pull(), held, factor)
