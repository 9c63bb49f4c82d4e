"""Experts of a mixture as linear layers of their own, each visited with the tokens it is given.

transformers keeps the experts of a block in two fused tensors. `unfused` has their three layers
each, computes the same, and so that every expert can be solved, shows each of them a sample of the
tokens that the router gave to others. Refuses experts that are no gated pair of projections.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from quant.errors import SourceError
from quant.intake.spelling import Leaves
from quant.solver import aside
from quant.solver.aside import Kept, Shelf

_FUSED = {"gate_up_proj", "down_proj"}
_here = threading.local()


class Rows(NamedTuple):
    """Which of a block's tokens an expert is reading."""

    tokens: Tensor  # [rows] int64, ascending: their places in the flattened batch
    routed: Tensor  # [rows] bool: whether the router chose the expert; the others are a sample


class Reading(NamedTuple):
    """What a linear layer reads; `rows` where it is an expert's."""

    inputs: Tensor
    rows: Rows | None


class Expert(nn.Module):
    """One expert's layers, by the names that checkpoints have for them."""

    def __init__(self, hidden: int, inner: int, leaves: Leaves) -> None:
        super().__init__()
        self._leaves = leaves
        for name, inputs, outputs in zip(
            leaves, (hidden, hidden, inner), (inner, inner, hidden), strict=True
        ):
            self.add_module(name, nn.Linear(inputs, outputs, bias=False))

    def forward(self, hidden: Tensor, gating: nn.Module) -> Tensor:
        gate, up, down = (self.get_submodule(name) for name in self._leaves)
        both = torch.cat([gate(hidden), up(hidden)], dim=-1)
        made: Tensor = down(gating._apply_gate(both))  # type: ignore[operator] # transformers' own
        return made


class Experts(nn.Module):
    """Stands for transformers' fused module; also reads one in `sampled` tokens, none at 0."""

    def __init__(self, fused: nn.Module, leaves: Leaves) -> None:
        super().__init__()
        count, hidden, inner = fused.get_parameter("down_proj").shape
        for name in _FUSED:
            delattr(fused, name)
        self.sampled, self._count, self._gating = 0, count, fused
        for place in range(count):
            self.add_module(str(place), Expert(hidden, inner, leaves))

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """hidden [tokens, width]; chosen experts and their weights [tokens, chosen]."""
        with aside.away(chosen, weights) as shelf:
            if shelf is None:
                return _sum(hidden, self._parts(hidden.__getitem__, chosen, weights))
            # All else that the block holds waits for the last expert: they stop too often for it.
            parts = self._parts(partial(shelf.rows, hidden), chosen, weights)
            kept = list(map(partial(_kept, shelf), parts))
        return _sum(hidden, ((tokens, part.tensor()) for tokens, part in kept))

    def _parts(
        self, read: Callable[[Tensor], Tensor], chosen: Tensor, weights: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each expert the tokens that the router gave it, and what it adds to them."""
        for place in range(self._count):
            picks = chosen == place
            routed = picks.any(dim=1)
            given = routed.clone()
            if self.sampled:
                given[:: self.sampled] = True
            tokens = given.nonzero()[:, 0]
            if len(tokens):
                with _reading(Rows(tokens, routed[tokens])):
                    made = self.get_submodule(str(place))(read(tokens), self._gating)
                own = routed[tokens]
                share = (weights * picks).sum(dim=1, keepdim=True)[tokens[own]]
                made = made[own] * share
                yield tokens[own], made
                del made


def _kept(shelf: Shelf, part: tuple[Tensor, Tensor]) -> tuple[Tensor, Kept]:
    tokens, made = part
    return tokens, Kept(made, shelf)


def _sum(like: Tensor, parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    out = torch.zeros_like(like)
    for tokens, made in parts:
        out.index_add_(0, tokens, made.to(out.dtype))
    return out


def unfuse(model: nn.Module, leaves: Leaves | None) -> None:
    """Puts `Experts` in the place of every fused module of a model. SourceError names one that
    cannot be taken apart."""
    for name, module in list(model.named_modules()):
        own = dict(module.named_parameters(recurse=False))
        if not own.keys() >= _FUSED or own["down_proj"].ndim != 3:
            continue
        _, outputs, inputs = own["gate_up_proj"].shape
        _, hidden, inner = own["down_proj"].shape
        plain = own.keys() == _FUSED and not vars(module).get("is_transposed", True)
        if leaves is None or not plain or (outputs, inputs) != (2 * inner, hidden):
            raise SourceError(
                f"{name} keeps its experts in a way that is not taken apart: Mixtral's and Qwen's"
                " are, a gate_proj, up_proj and down_proj without bias for each expert"
            )
        home, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(home), leaf, Experts(module, leaves))


@contextmanager
def sampling(block: nn.Module, one_in: int) -> Iterator[None]:
    """Shows every expert of a block one in so many tokens beside those routed to it."""
    found = [module for module in block.modules() if isinstance(module, Experts)]
    for module in found:
        module.sampled = one_in
    try:
        yield
    finally:
        for module in found:
            module.sampled = 0


def reading(inputs: Tensor) -> Reading:
    """What a layer that was just called with `inputs` reads."""
    return Reading(inputs, getattr(_here, "rows", None))


def real(reading: Reading, mask: Tensor) -> Tensor:
    """Where a reading is of tokens that count, `mask` [rows, length]: bool, to index it with."""
    return mask if reading.rows is None else mask.flatten()[reading.rows.tokens]


def paired(served: Rows, parent: Rows, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows of either model are of tokens that both show an expert, `mask` [rows, length]
    where they count; and which of those the served model's router chose."""
    real = mask.flatten()
    ours = real[served.tokens] & torch.isin(served.tokens, parent.tokens)
    theirs = real[parent.tokens] & torch.isin(parent.tokens, served.tokens)
    return ours, theirs, served.routed[ours]


@contextmanager
def _reading(rows: Rows) -> Iterator[None]:
    _here.rows = rows
    try:
        yield
    finally:
        _here.rows = None
