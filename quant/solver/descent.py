"""After the column solve: single steps and scales moved downhill, and the drift of inputs met.

Tensors in, tensors out. Both follow QUANT literature's closed forms: coordinate descent on the
integers with a refit of each scale (Two-Stage Grid, 2602.02126; ReQuant), and the shifted target
of QEP (2504.09629) and Qronos (2505.11695).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quant.solver import columns
from quant.solver.gptq import Factor, Hessian, Solution, dequantize
from quant.solver.grid import Levels

_PASSES = 2
_MOST_TIMES_ORDINARY = 4.0  # squared size of a token's inputs, by the median token's
_RIDGE = 0.01  # of the mean diagonal: descent fits the calibration's own noise without it


def evening(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Factors [tokens, 1] for the rows of each of `inputs` [tokens, columns].

    A few tokens (the first of a sequence, often) have inputs a thousand times as large as all
    others. Squared, nothing else would count, though the norm that follows cares for a token's
    error relative to its size: no token counts for more than a few ordinary ones.
    """
    energy = [rows.square().sum(dim=1, keepdim=True) for rows in inputs]
    most = _MOST_TIMES_ORDINARY * torch.cat(energy).median()
    # Where most tokens are zero there is no ordinary one.
    if not most:
        return [torch.ones_like(each) for each in energy]
    return [torch.where(each > most, most / each, torch.ones_like(each)).sqrt() for each in energy]


class Moments:
    """Of a layer's inputs over calibration tokens, [columns, columns] each.

    `hessian` is H = mean x x^T of inputs x as served; `drift` is D = mean (p - x) x^T, how the
    parent's inputs p differ along them.
    """

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        self.hessian = Hessian(width, device)
        self._drift = torch.zeros(width, width, device=device)

    def add(self, served: Tensor, parent: Tensor) -> None:
        """Counts every row of the inputs [tokens, columns]."""
        self.hessian.add(served)
        self._drift.addmm_((parent - served).T, served)

    def drift(self) -> Tensor:
        return self._drift / max(self.hessian.tokens, 1)


def shifted(weight: Tensor, fitted: Moments, held: Moments, factor: Factor) -> Tensor:
    """The target [rows, columns] whose outputs on served inputs are nearest the parent's.

    |x w' - p w|^2 is least at w' = w + w D H^-1; the whole way overfits, so it goes as far as is
    best on the held-out tokens, which has a closed form too: at most once the way, at least none.
    """
    way = factor.solved(weight @ fitted.drift())
    if held.hessian.is_zero():
        return weight
    gained = float(((weight @ held.drift()) * way).sum())
    spent = float(((way @ held.hessian.mean()) * way).sum())
    strength = min(max(gained / spent, 0.0), 1.0) if spent > 0 else 0.0
    return weight + strength * way


def improved(
    target: Tensor, start: Solution, moments: tuple[Moments, Moments], levels: Levels
) -> Solution:
    """`start` after `descend`, for the rows that are better for it on the held-out tokens too."""
    fitted, held = moments
    hessian = fitted.hessian.mean()
    codes, scale = descend(target, hessian, (start.codes, start.scale), levels)
    error = target - dequantize(codes, scale)
    loss = _loss(error, hessian)
    keep = loss < start.loss
    if not held.hessian.is_zero():
        check = held.hessian.mean()
        keep &= _loss(error, check) < _loss(target - start.weight(), check)
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
) -> tuple[Tensor, Tensor]:
    """Codes int8 [rows, columns] and scale [rows, groups] of less loss than those of `start`.

    Group by group: each integer to its best value while the others stay, then the group's scale
    by least squares where the stored scale gains by it. The loss, with a ridge, never rises.
    """
    codes, scale = start[0].float(), start[1].clone()
    ridged = hessian.clone()
    ridged.diagonal().add_(_RIDGE * float(hessian.diagonal().mean()))
    size = codes.shape[1] // scale.shape[1]
    error = target - dequantize(codes, scale)
    for _ in range(_PASSES):
        for place in range(scale.shape[1]):
            group = slice(place * size, (place + 1) * size)
            unit, inner = scale[:, place], ridged[group, group]
            gradient = error @ ridged[:, group]
            steps, matched, energy = columns.descend(codes[:, group], unit, gradient, inner, levels)
            unit = _refitted(unit, matched, energy, levels)
            codes[:, group], scale[:, place] = steps, unit
            error[:, group] = target[:, group] - steps * unit[:, None]
    return codes.to(torch.int8), scale


def _refitted(scale: Tensor, matched: Tensor, energy: Tensor, levels: Levels) -> Tensor:
    """Scale [rows] moved by matched / energy where what can be stored of it gains."""
    wanted = scale + torch.where(energy > 0, matched / energy, torch.zeros_like(scale))
    stored = levels.stored(wanted.abs()) * scale.sign()
    moved = stored - scale
    gains = moved * (moved * energy - 2 * matched) < 0
    return torch.where(gains & (wanted * scale > 0), stored, scale)
