"""One decoder block run over the calibration rows while a solver chooses its weights.

Two forwards of every batch go in step (`lockstep`): one as it will be served, through the
weights chosen so far, and the parent's own. Both stop before each group of layers that read the
same input, so that a solver sees what its layers will be given beside what they were meant for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from quant.errors import SolveError, SourceError
from quant.intake.source import Source
from quant.solver import blocks, folds, lockstep
from quant.solver.blocks import Decoder, Stream
from quant.solver.folds import Feed


class Inputs(NamedTuple):
    """What a layer is given, [tokens, columns] each: when served, and in the parent."""

    served: Tensor
    parent: Tensor


@dataclass(frozen=True, slots=True)
class Group:
    """Linear layers of one block that read the same input, by their names inside the block."""

    prefix: str  # of their names, as in "model.layers.0."
    linears: Mapping[str, nn.Linear]
    feed: Feed | None  # what could scale their inputs
    inputs: Sequence[Inputs]  # of each stream


class Solver(Protocol):
    """Who chooses the weights of the linear layers."""

    scales_inputs: bool  # whether it is worth looking for layers that feed others

    def seen(self, linear: nn.Linear, inputs: Tensor) -> Tensor:
        """What a served layer computes with: W8A8 rounds it, weight-only schemes do not."""

    def visit(self, group: Group) -> None:
        """Sets the weights of a group's layers."""


def run(
    decoder: Decoder,
    place: int,
    source: Source,
    streams: tuple[Sequence[Stream], Stream],
    solver: Solver,
) -> None:
    """Runs block `place` over the streams once, `solver` choosing its weights on the way.

    Layers are visited in the order the block calls them, those that share an input together;
    everything downstream already sees the chosen weights. `hidden` of each stream moves on.
    """
    block, (through, probe) = decoder.blocks[place], streams
    names = {name: f"{decoder.prefix}{place}.{name}" for name in block.state_dict()}
    with blocks.filled(block, names, source, decoder.device):
        first = Stream(through[0].parent[:1, : probe.hidden.shape[1]], probe.mask, probe.calls)
        trace = _Trace(block, partial(_forward, block, first, place))
        groups = trace.groups()
        unreached = blocks.linears(block).keys() - {name for group in groups for name in group}
        if unreached:
            raise SolveError(
                f"{decoder.prefix}{place}.{min(unreached)}: no calibration token reached it"
            )
        feeds = folds.found(block, groups, trace) if solver.scales_inputs else {}
        forwards = [partial(_forward, block, stream, place) for stream in through]
        parents = [partial(_forward, block, stream, place, parent=True) for stream in through]
        with (
            _stops(block, groups, solver),
            lockstep.lanes([*forwards, *parents]) as lanes,
        ):
            pairs = list(zip(lanes, lanes[len(through) :], through, strict=False))
            for group in groups:
                inputs = [Inputs(_next(lane, s), _next(other, s)) for lane, other, s in pairs]
                linears = {name: blocks.linears(block)[name] for name in group}
                prefix = f"{decoder.prefix}{place}."
                solver.visit(Group(prefix, linears, feeds.get(group[0]), inputs))
            for lane, other, stream in pairs:
                stream.hidden, stream.parent = _ended(lane), _ended(other)


_role = threading.local()


def _forward(block: nn.Module, stream: Stream, place: int, *, parent: bool = False) -> Tensor:
    args, kwargs = stream.calls[place]
    _role.parent = parent
    out = block(stream.parent if parent else stream.hidden, *args, **kwargs)
    hidden: Tensor = out[0] if isinstance(out, tuple) else out
    return hidden


class _Trace:
    """A short forward that tells what each linear layer read."""

    def __init__(self, block: nn.Module, forward: Callable[[], Tensor]) -> None:
        self._block, self._forward = block, forward

    def __call__(self) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs by name, in calling order, and the block's output."""
        read: dict[str, Tensor] = {}  # held, so that no memory is reused

        def note(_module: nn.Module, args: tuple[Tensor], *, name: str) -> None:
            if name in read:
                raise SourceError(f"{name} is used twice in one block: it has no single input")
            read[name] = args[0]

        with ExitStack() as undo, torch.no_grad():
            for name, linear in blocks.linears(self._block).items():
                hook = linear.register_forward_pre_hook(partial(note, name=name))
                undo.callback(hook.remove)
            return read, self._forward()

    def groups(self) -> list[list[str]]:
        """Linear layers in calling order, those that read the same tensor together."""
        groups: dict[tuple[int, int, int], list[str]] = {}
        for name, inputs in self()[0].items():
            key = (inputs.data_ptr(), inputs.numel(), inputs._version)
            groups.setdefault(key, []).append(name)
        return list(groups.values())


@contextmanager
def _stops(block: nn.Module, groups: Sequence[Sequence[str]], solver: Solver) -> Iterator[None]:
    """The first layer of each group stops its lane. Served lanes compute with the chosen weights
    and with what a server sees, the parent's with the weights that are there now."""
    leaders = {group[0] for group in groups}

    def meet(inputs: Tensor, *, linear: nn.Linear, leads: bool, own: Tensor) -> Tensor:
        if leads:
            lockstep.stop(inputs)
        if _role.parent:
            return functional.linear(inputs, own, linear.bias)
        return functional.linear(solver.seen(linear, inputs), linear.weight, linear.bias)

    with ExitStack() as undo:
        for name, linear in blocks.linears(block).items():
            own = linear.weight.clone()
            instead = partial(meet, linear=linear, leads=name in leaders, own=own)
            linear.forward = instead  # type: ignore[method-assign] # undone right below
            undo.callback(delattr, linear, "forward")
        yield


def _next(lane: lockstep.Lane, stream: Stream) -> Tensor:
    """Where the lane stops next: what it reads there, [tokens, columns]."""
    lane.advance()
    assert lane.waiting is not None, "a batch ended before its block's last layer"
    return stream.real(lane.waiting)


def _ended(lane: lockstep.Lane) -> Tensor:
    lane.advance()
    return lane.result()
