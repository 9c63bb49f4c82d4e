"""After the column solve: single steps and scales moved downhill, and the drift of inputs met.

Tensors in, tensors out. Both follow QUANT literature's closed forms: coordinate descent on the
integers with a refit of each scale (Two-Stage Grid, 2602.02126; ReQuant), and the shifted target
of QEP (2504.09629) and Qronos (2505.11695).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from quant import interrupt
from quant.solver import columns
from quant.solver.gptq import Factor, Solution, dequantize
from quant.solver.grid import Levels
from quant.solver.moments import HeldOut, rounded_factors

PART = {"cpu": 1 << 22, "cuda": 1 << 26}  # numbers of a weight that are solved together
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
    energy = [_sizes(rows).square_() for rows in inputs]
    together = torch.cat([each.to(energy[0].device) for each in energy])
    most = _MOST_TIMES_ORDINARY * float(together.median())
    # Where most tokens are zero there is no ordinary one.
    if not most:
        return [torch.ones_like(each) for each in energy]
    return [torch.where(each > most, most / each, torch.ones_like(each)).sqrt() for each in energy]


def _sizes(rows: Tensor) -> Tensor:
    """Length [tokens, 1] of each row, in float32."""
    sizes: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float32)
    return sizes


def few_rows(matrix: Tensor) -> tuple[Tensor, ...]:
    """In parts of so few rows that what is computed of them stays small beside a Hessian."""
    return torch.split(matrix, max(PART[matrix.device.type] // matrix.shape[1], 1))


def shifted(weight: Tensor, target: Tensor, asked: Tensor, held: HeldOut, factor: Factor) -> Tensor:
    """`target` [rows, columns] moved by what is `asked` of the outputs of `weight`, in its place.

    The outputs meant are the parent's, p w, and what the stream they are added to lacks, g:
    |x w' - (p w + g)|^2 is least at w' = w + (w D + G) H^-1, and either part can be asked for. The
    whole way overfits, so it goes as far as is best on the held-out tokens, which has a closed form
    too: at most once the way, at least none.
    """
    if held.is_zero():
        return target
    first, step = 0, max(1, len(weight) // _TELLING)
    for own, goal, its in zip(*map(few_rows, (weight, target, asked)), strict=True):
        way = factor.solved(its)
        some = slice(None, None, step)
        with rounded_factors():  # two numbers, of which a ratio is asked
            wanted = held.asked(slice(first, first + len(own), step))
            far = _strength(way[some], goal[some] - own[some], wanted, held)
        its.copy_(way.mul_(far)).add_(goal)
        first += len(own)
    return asked


def _strength(way: Tensor, gone: Tensor, wanted: Tensor, held: HeldOut) -> float:
    """How far to go a `way` [rows, columns] beyond what is `gone` already, by rows that tell and
    what is wanted of them."""
    bent = held.times(way)
    spent = float((bent * way).sum())
    if not spent > 0:
        return 0.0
    gained = float((wanted * way).sum()) - float((bent * gone).sum())
    return min(max(gained / spent, 0.0), 1.0)


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
            interrupt.check()
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
