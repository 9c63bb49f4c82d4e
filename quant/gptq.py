"""GPTQ: Hessians of layer inputs, and the codes that least disturb a layer's outputs.

Tensors in, tensors out. Refuses, with SolveError, what has no solution: no tokens, non-finite
numbers, inputs that are all zero, a Hessian that stays indefinite at any damping. Never rounds
silently instead.

Frantar et al., ICLR 2023 (2210.17323), in the equivalent form of LDLQ (Chee et al., 2307.13304):
with H = R R^T, R upper triangular, column k is rounded after adding
sum_{i<k} (w_i - q_i) R_ik / R_kk. One Cholesky of the reversed H, and no inverse.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant import grid
from quant.errors import SolveError
from quant.grid import Levels

_STRIP = 384  # columns of a Hessian updated at a time; only strips right of the diagonal are
_PANEL = 32  # columns quantized one after another before the next matrix product
_MOST_DAMPING = 10.0


class Hessian:
    """H = sum x x^T / tokens over the inputs [tokens, columns] of a layer, in float32."""

    def __init__(self, columns: int, device: torch.device | None = None) -> None:
        self._sum = torch.zeros(columns, columns, device=device)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Counts every row of `inputs` [tokens, columns]; leave padding out."""
        inputs = inputs.float()
        for start in range(0, inputs.shape[1], _STRIP):
            strip = inputs[:, start : start + _STRIP]
            self._sum[start : start + _STRIP, start:].addmm_(strip.T, inputs[:, start:])
        self.tokens += inputs.shape[0]

    def mean(self) -> Tensor:
        """[columns, columns]. SolveError without tokens, or with non-finite or all-zero inputs."""
        if self.tokens == 0:
            raise SolveError("no calibration token reached it")
        upper = self._sum.triu()
        whole = (upper + upper.triu(1).T) / self.tokens
        if not bool(torch.isfinite(whole).all()):
            raise SolveError("its inputs are not finite")
        if float(whole.diagonal().amax()) == 0:
            raise SolveError("its inputs are all zero")
        return whole


@dataclass(frozen=True, slots=True)
class Factor:
    """A damped Hessian, ready to solve with: columns in the order they are quantized.

    `feedback` [columns, columns] is unit lower triangular, R_ik / R_kk at [k, i]; `cost`
    [columns] is R_kk^2, what an error in a column costs after the later ones made up for it.
    """

    order: Tensor
    feedback: Tensor
    cost: Tensor
    damping: float
    dead: int  # columns whose input was zero throughout


@dataclass(frozen=True, slots=True)
class Solution:
    """Codes int8 [rows, columns] and scale float32 [rows, groups], in the order of the weight.

    The losses [rows] are (w - q) H (w - q)^T on the undamped H, of these codes and of rounding
    to nearest with the scale that fits the largest weight.
    """

    codes: Tensor
    scale: Tensor
    loss: Tensor
    rounding_loss: Tensor

    def rows(self, rows: slice) -> Solution:
        """Of some of the rows."""
        return Solution(
            self.codes[rows], self.scale[rows], self.loss[rows], self.rounding_loss[rows]
        )

    def weight(self) -> Tensor:
        """The weight a server will compute with, float32 [rows, columns]."""
        return dequantize(self.codes, self.scale)


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """Signed codes [rows, columns] times scale [rows, groups], in float32."""
    grouped = codes.float().reshape(*scale.shape, -1)  # [rows, groups, size]
    return (grouped * scale.float()[..., None]).flatten(1)


def factorize(hessian: Tensor, damping: float, group: int) -> Factor:
    """The factor of hessian [columns, columns] + damping * mean(diagonal) * identity.

    The damping doubles until the factorization succeeds. `group` columns share a scale.
    """
    diagonal = hessian.diagonal().clone()
    dead = diagonal == 0
    level = float(diagonal.mean())
    # A dead column is tied to no other: with any diagonal it is rounded to nearest by itself.
    diagonal[dead] = level
    order = _order(diagonal, group)
    reverse = order.flip(0)
    backwards = hessian[reverse][:, reverse]
    attempt = damping
    while attempt <= _MOST_DAMPING:
        backwards.diagonal().copy_(diagonal[reverse] + attempt * level)
        upper, failed = torch.linalg.cholesky_ex(backwards, upper=True)
        if not int(failed) and bool(torch.isfinite(upper).all()):
            lower = upper.flip(0, 1)  # R^T
            pivots = lower.diagonal().clone()
            feedback = lower.div_(pivots[:, None])
            return Factor(order, feedback, pivots.square(), attempt, int(dead.sum()))
        attempt *= 2
    raise SolveError(f"its Hessian could not be factorized with damping up to {attempt / 2:g}")


def solve(weight: Tensor, hessian: Tensor, factor: Factor, group: int, levels: Levels) -> Solution:
    """Codes for weight [rows, columns]; `group` columns share a scale, -1 for all of them.

    Rows are independent: stack every layer that reads the same input. A row for which plain
    rounding is better by the Hessian keeps plain rounding.
    """
    if not bool(torch.isfinite(weight).all()):
        raise SolveError("its weights are not finite")
    size = group if group > 0 else weight.shape[1]
    back = factor.order.argsort()
    columns = weight.float().T[factor.order]  # [columns, rows], in solving order
    steps, scales = _quantize_columns(columns, factor, size, levels)
    codes = steps[back].T.to(torch.int8)
    scale = scales[back[::size] // size].T  # a group stays whole in `order`: any member tells it
    solved = Solution(codes, scale.contiguous(), weight.new_empty(0), weight.new_empty(0))
    rounded = _rounded(weight.float(), size, levels)
    return _better(weight.float(), hessian, solved=(solved.codes, solved.scale), rounded=rounded)


def _order(diagonal: Tensor, group: int) -> Tensor:
    """Groups by their largest diagonal, columns inside a group by their own, largest first.

    What matters most is rounded while the most columns are left to make up for it; groups stay
    contiguous, so the checkpoint needs no column index ("group-aware reordering").
    """
    size = group if group > 0 else diagonal.numel()
    grouped = diagonal.view(-1, size)  # [groups, size]
    inside = grouped.argsort(dim=1, descending=True, stable=True)
    groups = grouped.amax(dim=1).argsort(descending=True, stable=True)
    starts = torch.arange(grouped.shape[0], device=diagonal.device) * size
    return (inside + starts[:, None])[groups].flatten()


def _quantize_columns(
    columns: Tensor, factor: Factor, size: int, levels: Levels
) -> tuple[Tensor, Tensor]:
    """Steps [columns, rows] and the scales [groups, rows] in solving order."""
    steps, errors = torch.empty_like(columns), torch.empty_like(columns)
    scales = []
    for start in range(0, columns.shape[0], size):
        group = slice(start, start + size)
        corrected = torch.addmm(columns[group], factor.feedback[group, :start], errors[:start])
        scale = grid.search(corrected, factor.cost[group], levels)
        scales.append(scale)
        for first in range(start, start + size, _PANEL):
            panel = slice(first, min(first + _PANEL, start + size))
            inside = corrected[first - start : panel.stop - start]
            inside.addmm_(factor.feedback[panel, start:first], errors[start:first])
            _quantize_panel(
                _Panel(inside, columns[panel], steps[panel], errors[panel]),
                factor.feedback[panel, panel],
                scale,
                levels,
            )
    return steps, torch.stack(scales)


@dataclass(frozen=True, slots=True)
class _Panel:
    """Views [panel, rows] of what one panel reads (corrected, wanted) and writes."""

    corrected: Tensor
    wanted: Tensor
    steps: Tensor
    errors: Tensor


def _quantize_panel(panel: _Panel, feedback: Tensor, scale: Tensor, levels: Levels) -> None:
    for place, (corrected, wanted, steps, error) in enumerate(
        zip(panel.corrected, panel.wanted, panel.steps, panel.errors, strict=True)
    ):
        if place:
            corrected.addmv_(panel.errors[:place].T, feedback[place, :place])
        torch.div(corrected, scale, out=steps).round_().clamp_(levels.low, levels.high)
        torch.addcmul(wanted, steps, scale, value=-1, out=error)


def _rounded(weight: Tensor, size: int, levels: Levels) -> tuple[Tensor, Tensor]:
    """Codes and scale of plain rounding."""
    columns = weight.reshape(-1, size).T  # [size, rows * groups]
    scale = levels.stored(grid.largest_fits(columns, levels))
    codes = grid.to_steps(columns, scale, levels).to(torch.int8).T.reshape(weight.shape)
    return codes, scale.view(weight.shape[0], -1)


def _better(
    weight: Tensor,
    hessian: Tensor,
    *,
    solved: tuple[Tensor, Tensor],
    rounded: tuple[Tensor, Tensor],
) -> Solution:
    losses = []
    for codes, scale in (solved, rounded):
        error = weight - dequantize(codes, scale)
        losses.append((error @ hessian).mul_(error).sum(dim=1))
    loss, rounding_loss = losses
    if not bool(torch.isfinite(loss).all()):
        raise SolveError("its solution is not finite")
    worse = (loss > rounding_loss)[:, None]
    return Solution(
        codes=torch.where(worse, rounded[0], solved[0]),
        scale=torch.where(worse, rounded[1], solved[1]),
        loss=torch.minimum(loss, rounding_loss),
        rounding_loss=rounding_loss,
    )
