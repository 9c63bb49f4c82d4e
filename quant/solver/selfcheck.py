"""Holds a model's blocks, walked one at a time, against one plain forward of the whole model.

What the solver relies on is checked here for every model, by experiment: that a block computes
alone, in our hands, what it computes in transformers' own forward. Refuses, in one line, models of
which that is not so: whose blocks share more than the states, run in another order, or cannot be
run by themselves. Streams like a run does: the weights of one block are held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quant import interrupt
from quant.errors import SourceError
from quant.intake import architecture, spelling
from quant.intake.source import Source
from quant.intake.spelling import Part
from quant.solver import blocks, walk
from quant.solver.blocks import Call, Decoder, Enough, Stream
from quant.solver.walk import Group

_TOKENS = 64
_NEAR = 1e-3  # of what a block adds to a token's states, in float32
_ROUNDINGS = 4  # of numbers in what blocks compute in, that may add up
_FLIPPED = 8  # one token in so many may meet another expert: routers are near ties at times
# What a model's own code lets fly when it is not run as it was written for.
_FOREIGN = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
            ValueError)  # fmt: skip


class _Passed(NamedTuple):
    """States [1, tokens, width] before and behind a block in the plain forward."""

    before: Tensor
    behind: Tensor


class _Untouched:
    """A solver that leaves every weight as it is."""

    scales_inputs = False

    def seen(self, _linear: nn.Linear, inputs: Tensor) -> Tensor:
        return inputs

    def visit(self, _group: Group) -> None:
        """Nothing is chosen."""


def run(decoder: Decoder, source: Source) -> None:
    """SourceError with the architecture and the first block that does not compute the same.

    Reads the weights twice, a block at a time, and runs every block over 64 drawn tokens.
    """
    alone = replace(decoder, others=())
    ids = _drawn(source).to(decoder.device)
    with _said(source, "transformers itself cannot run it on text"):
        passed = _plain(alone, source, ids)
    if passed[0].before.ndim != 3:  # Gemma-3n has four streams of states
        shape = list(passed[0].before.shape)
        raise _refused(alone, f"between its blocks are {shape} numbers, not a vector a token")
    _check_finite(alone, source, passed)
    with _said(source, "its blocks cannot be run one at a time"):
        (stream,), _ = blocks.embed(alone, source, [(ids, torch.ones_like(ids, dtype=torch.bool))])
        _check_states(alone, "what the first block is given", stream.hidden, passed[0].before)
        for place, states in enumerate(passed):
            interrupt.check()
            if place:
                between = f"what goes on to {_named(alone, place)}"
                _check_states(alone, between, passed[place - 1].behind, states.before)
            _check_block(alone, source, place, states, stream.calls)


@contextmanager
def _said(source: Source, what: str) -> Iterator[None]:
    """One line for whatever a model's own code lets fly; memory that ran out is no fault of it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _FOREIGN as fault:
        reason = " ".join(f"{type(fault).__name__}: {fault}".split())[:200]
        raise SourceError(f"{source.architecture} is not supported: {what} ({reason})") from fault


def _drawn(source: Source) -> Tensor:
    """Tokens [1, tokens] of the vocabulary, always the same."""
    length = min(_TOKENS, architecture.positions(source.config))
    most = source.config.get_text_config().vocab_size
    return torch.randint(most, (1, length), generator=torch.Generator().manual_seed(0))


def _plain(decoder: Decoder, source: Source, ids: Tensor) -> list[_Passed]:
    """Of each block, when transformers' own model runs over the tokens, its experts fused.

    Every block has its weights while it runs, and what is outside of them all the time.
    """
    model = blocks.hollow(source, decoder.device)
    fused = spelling.expert_parts(model)
    passed: list[_Passed] = []
    with ExitStack() as undo, torch.no_grad():
        undo.enter_context(blocks.embedding(decoder, model, source))
        for place in range(len(decoder.blocks)):
            block = model.get_submodule(_named(decoder, place))
            filled = partial(_filled, block, decoder, place, source, fused)
            noted = partial(_noted, decoder, place, passed)
            block.forward = partial(_run, block.forward, filled, noted)
        undo.callback(model.get_decoder().register_forward_hook(_end).remove)
        with suppress(Enough):
            model(input_ids=ids, use_cache=False)
    if len(passed) < len(decoder.blocks):
        raise _refused(decoder, f"{_named(decoder, len(passed))} does not run on every token")
    return passed


def _end(_module: nn.Module, _inputs: object, _out: object) -> None:
    raise Enough


def _run(
    forward: Any,
    filled: Callable[[], AbstractContextManager[None]],
    noted: Callable[[Tensor, Tensor], None],
    hidden: Tensor,
    *args: Any,
    **kwargs: Any,
) -> object:
    """A block's own forward."""
    interrupt.check()
    before = hidden.clone()
    with filled():
        out = forward(hidden, *args, **kwargs)
    noted(before, out[0] if isinstance(out, tuple) else out)
    return out


def _noted(
    decoder: Decoder, place: int, passed: list[_Passed], before: Tensor, behind: Tensor
) -> None:
    if place != len(passed):
        name = _named(decoder, place)
        raise _refused(decoder, f"{name} runs as number {len(passed)}, or more than once")
    passed.append(_Passed(before, behind.clone()))


@contextmanager
def _filled(
    block: nn.Module, decoder: Decoder, place: int, source: Source, fused: Mapping[str, Part]
) -> Iterator[None]:
    """The weights of transformers' own block inside it, those of its experts put together."""
    home, where = f"{decoder.prefix}{place}.", (decoder.device, decoder.dtype)
    own = {f"{home}{name}": name for name in block.state_dict()}
    parts = {name: part for name, part in fused.items() if part.of in own}
    whole = {part.of for part in parts.values()}
    plain = {leaf: decoder.stored_as(name) for name, leaf in own.items() if name not in whole}
    with blocks.filled(block, plain, source, *where):
        joined = {leaf: torch.empty_like(block.get_parameter(leaf), device=where[0], dtype=where[1])
                  for name, leaf in own.items() if name in whole}  # fmt: skip
        for name, part in parts.items():
            rows = joined[own[part.of]].view(-1, part.shape[-1])
            its = rows[part.first : part.first + part.shape[0]]
            its.copy_(source.tensors.get(name))
        with blocks.holding(block, joined):
            yield


def _check_finite(decoder: Decoder, source: Source, passed: list[_Passed]) -> None:
    """Weights are finite once they are read: then it is what config.json or an adapter makes of
    them."""
    for place, states in enumerate(passed):
        if not bool(states.behind.isfinite().all()):
            raise SourceError(
                f"{source.spec}: transformers itself computes numbers that are not finite in"
                f" {_named(decoder, place)}: a number in config.json"
                f"{' or in an adapter' if source.adapters else ''} is not the trained model's"
            )


def _check_block(
    decoder: Decoder, source: Source, place: int, states: _Passed, calls: list[Call]
) -> None:
    """By the very walk that a run takes, both ways, on what the plain forward gave the block."""
    mask = torch.ones(states.before.shape[:2], dtype=torch.bool, device=decoder.device)
    alone = [(tuple(map(_own, args)), {k: _own(v) for k, v in kwargs.items()})
             for args, kwargs in calls]  # fmt: skip
    stream, probe = (Stream(states.before, mask, alone) for _ in range(2))
    walk.run(decoder, place, source, ([stream], probe), _Untouched())
    added = (states.behind - states.before).float().norm(dim=-1)
    for found in (stream.hidden, stream.parent):
        _check_states(decoder, f"what {_named(decoder, place)} makes", found, states.behind, added)


def _own(value: Any) -> Any:
    """What one block leaves in a mapping that all are given, no other finds there: a run walks each
    of them several times, for two models and on other tokens."""
    return copy(value) if isinstance(value, MutableMapping) else value


def _check_states(
    decoder: Decoder, what: str, found: Tensor, meant: Tensor, added: Tensor | None = None
) -> None:
    """`added` [1, tokens] is how far states moved; where they did not, it is how large they are."""
    if found.shape != meant.shape:
        raise _refused(decoder, f"{what} is {list(found.shape)} instead of {list(meant.shape)}")
    size = meant.float().norm(dim=-1)
    missed = (found.float() - meant.float()).norm(dim=-1)
    moved = size if added is None else added
    rounding = _ROUNDINGS * torch.finfo(decoder.dtype).eps
    wrong = ~(missed <= max(_NEAR, rounding) * moved + rounding * size)
    if int(wrong.sum()) * _FLIPPED > wrong.numel():
        share = float((missed / moved.clamp_min(1e-30)).median())
        raise _refused(decoder, f"{what} is off by {share:.2g} of itself")


def _named(decoder: Decoder, place: int) -> str:
    return f"{decoder.prefix}{place}"


def _refused(decoder: Decoder, why: str) -> SourceError:
    return SourceError(
        f"{type(decoder.model).__name__} is not supported: run block by block it is not the model"
        f" that it is as a whole: {why}; no option changes that"
    )
