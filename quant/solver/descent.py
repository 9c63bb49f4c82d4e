"""After the column solve: single steps and scales moved downhill, and the drift of inputs met.

Tensors in, tensors out. Both follow QUANT literature's closed forms: coordinate descent on the
integers with a refit of each scale (Two-Stage Grid, 2602.02126; ReQuant), and the shifted target
of QEP (2504.09629) and Qronos (2505.11695).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from quant.solver import columns, gptq
from quant.solver.gptq import Factor, Hessian, Solution, dequantize
from quant.solver.grid import Levels

_PASSES = 1
_MOST_TIMES_ORDINARY = 4.0  # squared size of a token's inputs, by the median token's
_TELLING = 256  # rows, evenly spread, tell how far a layer's target moves
_RIDGE = 0.01  # of the mean diagonal: descent fits the calibration's own noise without it


def evening(inputs: Iterable[Tensor]) -> list[Tensor]:
    """Factors [tokens, 1] for the rows of each of `inputs` [tokens, columns].

    A few tokens (the first of a sequence, often) have inputs a thousand times as large as all
    others. Squared, nothing else would count, though the norm that follows cares for a token's
    error relative to its size: no token counts for more than a few ordinary ones.
    """
    energy = [rows.float().square().sum(dim=1, keepdim=True) for rows in inputs]
    together = torch.cat([each.to(energy[0].device) for each in energy])
    most = _MOST_TIMES_ORDINARY * float(together.median())
    # Where most tokens are zero there is no ordinary one.
    if not most:
        return [torch.ones_like(each) for each in energy]
    return [torch.where(each > most, most / each, torch.ones_like(each)).sqrt() for each in energy]


class Moments:
    """Of a layer's inputs over calibration tokens, [columns, columns] each.

    `hessian` is H = mean x x^T of inputs x as served; the drift is D = mean (p - x) x^T, how the
    parent's inputs p differ along them.
    """

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        self.hessian = Hessian(width, device)
        self._drift = torch.zeros(width, width, device=device)

    def add(self, served: Tensor, parent: Tensor) -> None:
        """Counts every row of the inputs [tokens, columns]."""
        self.hessian.add(served)
        gptq.accumulate(self._drift, parent - served, served)

    def take(self, other: Moments) -> None:
        """Counts what another one has counted, wherever that lies."""
        self.hessian.take(other.hessian)
        self._drift += other._drift.to(self._drift.device)

    def is_zero(self) -> bool:
        """Whether nothing was added, or nothing but zeros as served."""
        return self.hessian.is_zero()

    def pull(self, weight: Tensor) -> Tensor:
        """w D [rows, columns]: what the drift asks of a weight's outputs."""
        return (weight @ self._drift).div_(max(self.hessian.tokens, 1))

    def loss(self, error: Tensor) -> Tensor:
        """e H e^T [rows] of each row e of `error` [rows, columns]."""
        return _loss(error, self.hessian.mean())

    def gained(self, before: Tensor, after: Tensor) -> Tensor:
        """By how much [rows] the loss of the error `before` is above that of the one `after`."""
        return ((before - after) @ self.hessian.mean()).mul_(before + after).sum(dim=1)


class Sample:
    """The same of tokens that are kept as they are: less to hold where they are fewer than columns,
    and less to multiply."""

    def __init__(self) -> None:
        self._served: list[Tensor] = []
        self._drift: list[Tensor] = []

    def add(self, served: Tensor, parent: Tensor) -> None:
        self._served.append(served.float().clone())
        self._drift.append((parent - served).float())

    def is_zero(self) -> bool:
        return not any(bool(rows.any()) for rows in self._served)

    def pull(self, weight: Tensor) -> Tensor:
        found = torch.zeros_like(weight)
        for served, drift in zip(self._served, self._drift, strict=True):
            found.addmm_((drift @ weight.T).T, served)
        return found.div_(max(self._tokens(), 1))

    def loss(self, error: Tensor) -> Tensor:
        found = error.new_zeros(len(error))
        for served in self._served:
            found += (served @ error.T).square_().sum(dim=0)
        return found.div_(max(self._tokens(), 1))

    def gained(self, before: Tensor, after: Tensor) -> Tensor:
        return self.loss(before) - self.loss(after)

    def _tokens(self) -> int:
        return sum(map(len, self._served))


def merged(parts: Sequence[Moments], device: torch.device) -> Moments:
    """Of the tokens of all parts, on `device`, where at least one has been."""
    whole = next(part for part in parts if part.hessian.device == device)
    for part in parts:
        if part is not whole:
            whole.take(part)
    return whole


HeldOut = Moments | Sample  # of tokens that nothing was fitted to


def held_out(tokens: int, width: int, device: torch.device) -> HeldOut:
    """Whichever of the two is smaller for so many tokens."""
    return Sample() if tokens <= width else Moments(width, device)


def shifted(weight: Tensor, pulled: Tensor, held: HeldOut, factor: Factor) -> Tensor:
    """The target [rows, columns] whose outputs on served inputs are nearest the parent's.

    |x w' - p w|^2 is least at w' = w + w D H^-1, `pulled` being w D; the whole way overfits, so it
    goes as far as is best on the held-out tokens, which has a closed form too: at most once the
    way, at least none.
    """
    if held.is_zero():
        return weight
    way = factor.solved(pulled)
    some = slice(None, None, max(1, len(weight) // _TELLING))
    gained = float((held.pull(weight[some]) * way[some]).sum())
    spent = float(held.loss(way[some]).sum())
    strength = min(max(gained / spent, 0.0), 1.0) if spent > 0 else 0.0
    return way.mul_(strength).add_(weight)


def improved(
    target: Tensor, start: Solution, known: tuple[Tensor, HeldOut], levels: Levels
) -> Solution:
    """`start` after `descend` on the Hessian in `known`, for the rows that are better for it on
    the held-out tokens too."""
    hessian, held = known
    codes, scale, moved = descend(target, hessian, (start.codes, start.scale), levels)
    loss = start.loss + moved
    keep = moved < 0
    if not held.is_zero():
        keep &= held.gained(target - start.weight(), target - dequantize(codes, scale)) > 0
    kept = keep[:, None]
    return Solution(
        codes=torch.where(kept, codes, start.codes),
        scale=torch.where(kept, scale, start.scale),
        loss=torch.where(keep, loss, start.loss),
        rounding_loss=start.rounding_loss,
    )


def _loss(error: Tensor, hessian: Tensor) -> Tensor:
    return (error @ hessian).mul_(error).sum(dim=1)


def descend(
    target: Tensor, hessian: Tensor, start: tuple[Tensor, Tensor], levels: Levels
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 [rows, columns] and scale [rows, groups] of less loss than those of `start`, and
    by how much [rows] the loss moved.

    Group by group: each integer to its best value while the others stay, then the group's scale
    by least squares where the stored scale gains by it. The loss, with a ridge, never rises.
    """
    diagonal = hessian.diagonal()
    plain = diagonal.clone()
    ridge = _RIDGE * float(plain.mean())
    diagonal.add_(ridge)  # in place: a copy would be as large as all else
    try:
        return _descended(target, (hessian, ridge), start, levels)
    finally:
        diagonal.copy_(plain)


def _descended(
    target: Tensor, ridged: tuple[Tensor, float], start: tuple[Tensor, Tensor], levels: Levels
) -> tuple[Tensor, Tensor, Tensor]:
    (hessian, ridge), codes, scale = ridged, start[0].float(), start[1].clone()
    size = codes.shape[1] // scale.shape[1]
    error = target - dequantize(codes, scale)
    moved = ridge * error.square().sum(dim=1)
    for _ in range(_PASSES):
        for place in range(scale.shape[1]):
            group = slice(place * size, (place + 1) * size)
            unit, inner = scale[:, place], hessian[group, group]
            gradient = error @ hessian[:, group]
            steps, matched, energy = columns.descend(codes[:, group], unit, gradient, inner, levels)
            unit = _refitted(unit, matched, energy, levels)
            codes[:, group], scale[:, place] = steps, unit
            left = target[:, group] - steps * unit[:, None]
            step = left - error[:, group]
            moved += (step @ inner).add_(gradient, alpha=2).mul_(step).sum(dim=1)
            error[:, group] = left
    return codes.to(torch.int8), scale, moved.sub_(error.square().sum(dim=1), alpha=ridge)


def _refitted(scale: Tensor, matched: Tensor, energy: Tensor, levels: Levels) -> Tensor:
    """Scale [rows] moved by matched / energy where what can be stored of it gains."""
    wanted = scale + torch.where(energy > 0, matched / energy, torch.zeros_like(scale))
    stored = levels.stored(wanted.abs()) * scale.sign()
    moved = stored - scale
    gains = moved * (moved * energy - 2 * matched) < 0
    return torch.where(gains & (wanted * scale > 0), stored, scale)
