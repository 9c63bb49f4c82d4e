"""One decoder block run over the calibration rows while a solver chooses its weights.

Two forwards of every batch go in step (`lockstep`): one as it will be served, through the
weights chosen so far, and the parent's own. Both stop before each group of layers that read the
same input, so that a solver sees what its layers will be given beside what they were meant for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from quant import interrupt
from quant.errors import SolveError
from quant.intake.source import Source
from quant.solver import aside, blocks, experts, kinship, lockstep
from quant.solver.aside import Pair, Pick
from quant.solver.blocks import Decoder, Stream
from quant.solver.experts import Reading
from quant.solver.folds import Feed

ONE_IN = 17  # tokens are shown to every expert: a prime, so that all places of a row come up

Lane = lockstep.Lane[Reading]


class Inputs(NamedTuple):
    """What a layer is given, [tokens, columns] each: when served, and in the parent.

    `routed` [tokens] tells of an expert's tokens which its router chose; the others are a sample
    of what it does not get. `gap` [tokens, rows] is how far the parent's stream of states is from
    the served one where the layer adds to it; None of a layer that does not.
    """

    served: Tensor
    parent: Tensor
    routed: Tensor | None = None
    gap: Tensor | None = None


class Given(Protocol):
    """The same, read when asked for."""

    @property
    def served(self) -> Tensor: ...

    @property
    def parent(self) -> Tensor: ...

    @property
    def routed(self) -> Tensor | None: ...

    @property
    def gap(self) -> Tensor | None: ...


# The block's output [tokens, width] on a sample of the parent's tokens, were layers to compute so.
Outcome = Callable[[Mapping[nn.Linear, Callable[[Tensor], Tensor]]], Tensor]


@dataclass(frozen=True, slots=True)
class Group:
    """Linear layers of one block that read the same input, by their names inside the block."""

    prefix: str  # of their names, as in "model.layers.0."
    linears: Mapping[str, nn.Linear]
    feed: Feed | None  # what could scale their inputs
    inputs: Sequence[Given]  # of each stream
    outcome: Outcome


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
    with ExitStack() as held:
        for copy in decoder.all():
            where = copy.device, copy.dtype
            held.enter_context(blocks.filled(copy.blocks[place], copy.names(place), source, *where))
        samples = [_sample(stream, probe) for stream in through]
        outcome = partial(_outcome, block, samples, place)
        forward = partial(_forward, block, place=place)
        kin = kinship.found(block, forward, samples[0], scales_inputs=solver.scales_inputs)
        unreached = blocks.linears(block).keys() - {name for group in kin.groups for name in group}
        if unreached:
            missed = decoder.home(place) + decoder.module(place, min(unreached))
            raise SolveError(f"{missed}: no calibration token reached it")
        for copy in decoder.all():
            its, owned = copy.blocks[place], _owned(copy, place, source)
            held.enter_context(experts.sampling(its, one_in=ONE_IN))
            held.enter_context(_stops(its, block, kin.groups, solver, owned))
            held.enter_context(_followed(its, kin.adders[:-1]))
        pairs = held.enter_context(_lanes(decoder, place, through))
        for stream in through if kin.adders else ():
            stream.gap = stream.parent.float() - stream.hidden
        for group in kin.groups:
            inputs = [_given(*pair, adds=group[0] in kin.adders) for pair in pairs]
            named = _named(decoder, place, group, kin.feeds.get(group[0]), source)
            solver.visit(Group(decoder.home(place), *named, inputs, outcome))
            del inputs  # before the next ones come
            _hand_on(decoder, place, group)
        for lane, other, stream in pairs:
            stream.hidden, stream.parent, stream.gap = _ended(lane), _ended(other), None


@contextmanager
def _lanes(
    decoder: Decoder, place: int, through: Sequence[Stream]
) -> Iterator[list[tuple[Lane, Lane, Stream]]]:
    """For each stream the lane as served and the parent's, in the copy that runs it."""
    forwards = [
        partial(_forward, decoder.all()[stream.copy].blocks[place], stream, place, parent=parent)
        for parent in (False, True)
        for stream in through
    ]
    with lockstep.lanes(forwards) as lanes:
        yield list(zip(lanes, lanes[len(through) :], through, strict=False))


def _hand_on(decoder: Decoder, place: int, names: Sequence[str]) -> None:
    """The weights that were chosen, to the other copies."""
    chosen = blocks.linears(decoder.blocks[place])
    for copy in decoder.others:
        theirs = blocks.linears(copy.blocks[place])
        for name in names:
            theirs[name].weight.copy_(chosen[name].weight)


def _named(
    decoder: Decoder, place: int, names: Sequence[str], feed: Feed | None, source: Source
) -> tuple[Mapping[str, nn.Linear], Feed | None]:
    """Under the names that the checkpoint has, and the feed with the weight that is there."""
    linears = blocks.linears(decoder.blocks[place])
    named = {decoder.module(place, name): linears[name] for name in names}
    if feed is not None:
        its = source.tensors.get(decoder.names(place)[f"{feed.name}.weight"])
        own = its.to(feed.own.device, torch.float32)
        feed = replace(feed, name=decoder.module(place, feed.name), own=own)
    return named, feed


_role = threading.local()


def _forward(block: nn.Module, stream: Stream, place: int, *, parent: bool = False) -> Tensor:
    interrupt.check()
    args, kwargs = stream.calls[place]
    _role.parent, _role.stream = parent, stream
    with aside.holding(stream.shelf):
        out = block(stream.parent if parent else stream.hidden, *args, **kwargs)
    hidden: Tensor = out[0] if isinstance(out, tuple) else out
    return hidden


def _sample(stream: Stream, probe: Stream) -> Stream:
    """The first tokens of a stream's first row, as the parent has them.

    Where none of them counts, as in the question before an answer, all do.
    """
    length = probe.hidden.shape[1]
    device = probe.mask.device  # a copy, since a part would hold the whole of them
    hidden, mask = (part[:1, :length].clone().to(device) for part in (stream.parent, stream.mask))
    return Stream(hidden, mask if bool(mask.any()) else torch.ones_like(mask), probe.calls)


def _outcome(
    block: nn.Module,
    samples: Sequence[Stream],
    place: int,
    instead: Mapping[nn.Linear, Callable[[Tensor], Tensor]],
) -> Tensor:
    """What comes out of the parent's block, if some of its layers computed `instead`."""
    _role.instead = instead
    try:
        with torch.no_grad():
            outs = [sample.real(_forward(block, sample, place)) for sample in samples]
    finally:
        del _role.instead
    return torch.cat(outs)


@contextmanager
def _stops(
    block: nn.Module,
    known: nn.Module,
    groups: Sequence[Sequence[str]],
    solver: Solver,
    owned: Mapping[str, Tensor],
) -> Iterator[None]:
    """The first layer of each group stops its lane. Served lanes compute with the chosen weights
    and with what a server sees, the parent's with those that it `owned`. `known` is the copy of the
    block whose layers the solver knows."""
    leaders, theirs = {group[0] for group in groups}, blocks.linears(known)

    def meet(inputs: Tensor, *, name: str, linear: nn.Linear, own: Tensor) -> Tensor:
        interrupt.check()
        instead = getattr(_role, "instead", None)
        if instead is not None:
            trial = instead.get(linear)
            before = partial(functional.linear, weight=own.to(inputs.dtype), bias=linear.bias)
            return (trial or before)(inputs)
        if name in leaders:
            shown = experts.reading(inputs)
            with aside.away(*(shown.rows or ())):
                lockstep.stop(shown)
        if _role.parent:
            return functional.linear(inputs, own.to(inputs.dtype), linear.bias)
        chosen = linear.weight.to(inputs.dtype)
        seen = solver.seen(theirs[name], inputs).to(inputs.dtype)
        return functional.linear(seen, chosen, linear.bias)

    with ExitStack() as undo:
        for name, linear in blocks.linears(block).items():
            instead = partial(meet, name=name, linear=linear, own=owned[name])
            linear.forward = instead  # type: ignore[method-assign] # undone right below
            undo.callback(delattr, linear, "forward")
        yield


@contextmanager
def _followed(block: nn.Module, adders: Sequence[str]) -> Iterator[None]:
    """Keeps the streams' gaps up with what these layers add to them."""

    def follow(_linear: nn.Module, _inputs: object, made: Tensor) -> None:
        if getattr(_role, "instead", None) is None and _role.stream.gap is not None:
            _role.stream.gap += made if _role.parent else -made

    with ExitStack() as undo:
        for name in adders:
            undo.callback(block.get_submodule(name).register_forward_hook(follow).remove)
        yield


def _owned(decoder: Decoder, place: int, source: Source) -> dict[str, Tensor]:
    """The weights that the parent's forwards multiply with, no larger than the source has them.

    Where forwards have fewer bits than the source, its own weights come into the layers: what is
    quantized is what it has.
    """
    names, owned = decoder.names(place), {}
    for name, linear in blocks.linears(decoder.blocks[place]).items():
        its, computed = names[f"{name}.weight"], linear.weight.dtype
        stored = source.tensors.dtype(its)
        kept = stored if stored.itemsize < computed.itemsize else computed
        owned[name] = linear.weight.to(kept, copy=True)
        if torch.promote_types(stored, computed) != computed:
            whole = source.tensors.get(its).to(linear.weight.device)
            linear.weight = nn.Parameter(whole, requires_grad=False)
    return owned


def _given(lane: Lane, other: Lane, stream: Stream, *, adds: bool) -> Given:
    """Where a served lane and the parent's stop next: what they read there of real tokens."""
    served, parent = _next(lane), _next(other)
    picks: tuple[Pick, Pick] = stream.real, stream.real
    routed = None
    if served.rows is not None and parent.rows is not None:
        ours, theirs, routed = experts.paired(served.rows, parent.rows, stream.mask)
        picks = (lambda inputs: inputs[ours]), (lambda inputs: inputs[theirs])
    if stream.shelf is not None:
        lacking = (lambda: stream.gap) if adds else (lambda: None)
        return Pair(stream.shelf, (served.inputs, parent.inputs), picks, routed, lacking)
    gap = stream.real(stream.gap) if adds and stream.gap is not None else None
    return Inputs(picks[0](served.inputs), picks[1](parent.inputs), routed, gap)


def _next(lane: Lane) -> Reading:
    lane.advance()
    assert lane.waiting is not None, "a batch ended before its block's last layer"
    return lane.waiting


def _ended(lane: Lane) -> Tensor:
    lane.advance()
    return lane.result()
