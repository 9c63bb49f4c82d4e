"""How several adapters become one change of a tensor: weights, method, and what they draw.

Joins `quant.lora.merge`, which knows adapters, and `quant.lora.combine`, which knows tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from quant import interrupt
from quant.errors import AdapterError, RecipeError
from quant.lora import combine, merge
from quant.lora.adapter import Adapter, transposed

Method = Literal["linear", "cat", "ties", "dare"]
# TIES keeps the top 20% (its section 4); DARE drops half: safe for adapters of any strength.
DENSITIES: dict[Method, float] = {"linear": 1.0, "cat": 1.0, "ties": 0.2, "dare": 0.5}

Stored = Callable[[str], Tensor]  # the base's tensor of that name
Tell = Callable[[str], None]  # the tensor that is read


@dataclass(frozen=True, slots=True)
class Mixture:
    """`density` (None is the method's own) and `seed` matter to TIES and DARE alone."""

    weights: tuple[float, ...]
    method: Method = "linear"
    density: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise RecipeError(f"--method {self.method!r}: one of {', '.join(get_args(Method))}")
        if not 0 < self.kept <= 1:
            raise RecipeError(f"--density {self.kept:g}: above 0 and at most 1 is needed")
        if self.density is not None and self.method in ("linear", "cat"):
            raise RecipeError(f"--density means nothing to --method {self.method}: ties or dare")

    @property
    def kept(self) -> float:
        return DENSITIES[self.method] if self.density is None else self.density


@dataclass(frozen=True, slots=True)
class Mixer:
    """Adapters with what their mixture needs to know beforehand; `cutoffs` are TIES's."""

    mixture: Mixture
    adapters: tuple[Adapter, ...]
    cutoffs: tuple[float, ...] = ()

    def mixed(self, stored: Tensor, name: str) -> Tensor:
        """The base's tensor with the mixture added; float32, as stored where nothing moves it."""
        moving = [place for place, a in enumerate(self.adapters) if merge.touches(a, name)]
        if not moving:
            return stored
        weights = [self.mixture.weights[place] for place in moving]
        adapters = [self.adapters[place] for place in moving]
        if (
            len(moving) == 1
            and (whole := self._alone(adapters[0], weights[0], stored, name)) is not None
        ):
            return whole
        if self.mixture.method == "cat":
            return stored.float() + _concatenated(adapters, weights, name)
        changes = [merge.change(adapter, stored, name) for adapter in adapters]
        if self.mixture.method == "ties":
            cutoffs = [self.cutoffs[place] for place in moving]
            return stored.float() + combine.ties(changes, weights, cutoffs)
        if self.mixture.method == "dare":
            changes = [self._thinned(*each, name) for each in zip(adapters, changes, strict=True)]
        return stored.float() + combine.linear(changes, weights)

    def _alone(self, adapter: Adapter, weight: float, stored: Tensor, name: str) -> Tensor | None:
        """The tensor with its only adapter merged whole, where nothing is to be done to that."""
        after = merge.alone(adapter, stored, name)
        resized = after.shape != stored.shape
        if resized and weight != 1:
            raise AdapterError(
                f"adapter {adapter.folder} resizes {name}: its weight can only be 1", field=name
            )
        # To the bit, and not by way of a difference.
        exact = weight == 1 and self.mixture.method in ("linear", "cat")
        return after if resized or exact else None

    def _thinned(self, adapter: Adapter, change: Tensor, name: str) -> Tensor:
        """Drawn anew for each adapter and tensor, whatever the order they are read in."""
        text = f"{self.mixture.seed}\n{adapter.digest}\n{name}".encode()
        number = int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1
        return combine.dare(change, self.mixture.kept, torch.Generator().manual_seed(number))


def mixer(mixture: Mixture, adapters: Sequence[Adapter], stored: Stored, tell: Tell) -> Mixer:
    """Ready to mix; for TIES this reads every changed tensor twice, to trim over all of them."""
    if mixture.method == "cat":
        for adapter in adapters:
            _check_cat(adapter)
    if mixture.method != "ties":
        return Mixer(mixture, tuple(adapters))
    cutoffs = [
        combine.cutoff(partial(_changes, adapter, stored, tell), mixture.kept)
        for adapter in adapters
    ]
    return Mixer(mixture, tuple(adapters), tuple(cutoffs))


def passes(mixture: Mixture) -> int:
    """How often every changed tensor is read before the one that is written."""
    return 2 if mixture.method == "ties" else 0


def _changes(adapter: Adapter, stored: Stored, tell: Tell) -> Iterator[Tensor]:
    for name in sorted(adapter.parts.tensors()):
        interrupt.check()
        tell(name)
        before = stored(name)
        if merge.is_plain(adapter, name):
            yield merge.change(adapter, before, name).contiguous()
        elif (after := merge.alone(adapter, before, name)).shape == before.shape:
            yield after - before.float()  # a resized tensor is taken whole, not trimmed


def _check_cat(adapter: Adapter) -> None:
    odd = [name for name in sorted(adapter.parts.tensors()) if not merge.is_plain(adapter, name)]
    if odd:
        raise AdapterError(
            f"adapter {adapter.folder} changes {odd[0]} by more than a pair of factors, which"
            " --method cat concatenates; --method linear gives the same sum",
            field=odd[0],
        )


def _concatenated(adapters: Sequence[Adapter], weights: Sequence[float], name: str) -> Tensor:
    module = name.removesuffix(".weight")
    factors = [w * a.pairs[module].scale for a, w in zip(adapters, weights, strict=True)]
    product = combine.concatenated([merge.pair(a, module) for a in adapters], factors)
    return product.T if transposed(adapters[0], module) else product
