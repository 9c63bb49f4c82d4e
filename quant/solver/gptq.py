"""GPTQ: the codes that least disturb a layer's outputs, by the Hessian of its inputs.

Tensors in, tensors out. Refuses, with SolveError, what has no solution: non-finite numbers, a
Hessian that stays indefinite at any damping. Never rounds silently instead.

Frantar et al., ICLR 2023 (2210.17323), in the equivalent form of LDLQ (Chee et al., 2307.13304):
with H = R R^T, R upper triangular, column k is rounded after adding
sum_{i<k} (w_i - q_i) R_ik / R_kk. One Cholesky of the reversed H, and no inverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quant import interrupt
from quant.errors import SolveError
from quant.solver import columns, grid
from quant.solver.grid import Levels
from quant.solver.moments import energy

_PANEL = 128  # columns quantized one after another before the next matrix product
_MOST_DAMPING = 10.0
_CHUNK = 1 << 20  # numbers moved at a time


@dataclass(frozen=True, slots=True)
class Factor:
    """A damped Hessian, ready to solve with: columns in the order they are quantized.

    `feedback` [columns, columns] is unit lower triangular, R_ik / R_kk at [k, i]; `cost`
    [columns] is R_kk^2, what an error in a column costs after the later ones made up for it;
    `added` [columns] is what the diagonal was damped with.
    """

    order: Tensor
    feedback: Tensor
    cost: Tensor
    added: Tensor
    damping: float
    dead: int  # columns whose input was zero throughout

    def solved(self, rows: Tensor) -> Tensor:
        """`rows` [rows, columns] times the inverse of the damped Hessian, which is F^T C F."""
        feedback = self.feedback
        half = torch.linalg.solve_triangular(
            feedback, rows[:, self.order], upper=False, left=False, unitriangular=True
        ).div_(self.cost)
        found = torch.linalg.solve_triangular(
            feedback.T, half, upper=True, left=False, unitriangular=True
        )
        back: Tensor = found[:, self.order.argsort()]
        return back


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


def stacked(parts: Sequence[Solution]) -> Solution:
    """Of all their rows."""
    return Solution(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat([part.loss for part in parts]),
        torch.cat([part.rounding_loss for part in parts]),
    )


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """Signed codes [rows, columns] times scale [rows, groups], in float32."""
    grouped = codes.float().reshape(*scale.shape, -1)  # [rows, groups, size]
    return (grouped * scale.float()[..., None]).flatten(1)


def factorize(hessian: Tensor, damping: float, group: int, draw: int = 0) -> Factor:
    """The factor of hessian [columns, columns] + damping * mean(diagonal) * identity.

    The damping doubles until the factorization succeeds. `group` columns share a scale. Each
    `draw` but 0 has them quantized in another order.
    """
    diagonal = hessian.diagonal().clone()
    dead = diagonal == 0
    level = float(diagonal.mean())
    # A dead column is tied to no other: with any diagonal it is rounded to nearest by itself.
    diagonal[dead] = level
    order = _order(diagonal * _luck(diagonal, draw) if draw else diagonal, group)
    reverse = order.flip(0)
    attempt = damping
    interrupt.check()
    while attempt <= _MOST_DAMPING:
        # The one matrix beside the Hessian: factorized, turned around and scaled in its place.
        square = hessian[reverse[:, None], reverse]
        square.diagonal().copy_(diagonal[reverse] + attempt * level)
        if _factorized(square):
            _turn(square)  # R^T
            pivots = square.diagonal().clone()
            feedback = square.div_(pivots[:, None])
            added = torch.where(dead, level, 0)[order] + attempt * level
            return Factor(order, feedback, pivots.square(), added, attempt, int(dead.sum()))
        attempt *= 2
    raise SolveError(f"its Hessian could not be factorized with damping up to {attempt / 2:g}")


def _factorized(square: Tensor) -> bool:
    """Puts the upper triangular U of a symmetric matrix U^T U in its place, if there is one."""
    # LAPACK works on columns: only their order spares it a copy of the whole.
    failed = torch.empty(0, dtype=torch.int32, device=square.device)
    torch.linalg.cholesky_ex(square.T, out=(square.T, failed))
    return not int(failed) and bool(torch.isfinite(square.diagonal()).all())


def _turn(square: Tensor) -> None:
    """Both axes of a matrix turned around, in its place."""
    flat = square.view(-1)
    for start in range(0, len(flat) // 2, _CHUNK):
        stop = min(start + _CHUNK, len(flat) // 2)
        front, back = flat[start:stop], flat[len(flat) - stop : len(flat) - start]
        held = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(held)


def solve(weight: Tensor, hessian: Tensor, factor: Factor, group: int, levels: Levels) -> Solution:
    """Codes for weight [rows, columns]; `group` columns share a scale, -1 for all of them.

    Rows are independent: stack every layer that reads the same input. A row for which plain
    rounding is better by the Hessian keeps plain rounding.
    """
    weight = weight.float()
    codes, scale = _rounded(weight, group, levels)
    loss = energy(weight - dequantize(codes, scale), hessian)
    return bettered(Solution(codes, scale, loss, loss), weight, factor, levels)


def rounded(weight: Tensor, group: int, levels: Levels) -> Solution:
    """Plain rounding, of a layer whose inputs are all zero: whatever its codes, nothing is lost."""
    nothing = weight.new_zeros(len(weight), dtype=torch.float32)
    return Solution(*_rounded(weight.float(), group, levels), nothing, nothing)


def bettered(start: Solution, weight: Tensor, factor: Factor, levels: Levels) -> Solution:
    """Row by row `start`, or what the order of this factor comes to where that loses less."""
    size = weight.shape[1] // start.scale.shape[1]
    back = factor.order.argsort()
    steps, scale, loss = _quantize(weight[:, factor.order], factor, size, levels)
    if not bool(torch.isfinite(loss).all()):
        raise SolveError("its solution is not finite")
    gains = loss < start.loss
    gained = gains[:, None]
    return Solution(
        codes=torch.where(gained, steps[:, back].to(torch.int8), start.codes),
        # A group stays whole in `order`: any member tells where its scale went.
        scale=torch.where(gained, scale[:, back[::size] // size], start.scale),
        loss=torch.where(gains, loss, start.loss),
        rounding_loss=start.rounding_loss,
    )


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


def _luck(diagonal: Tensor, draw: int) -> Tensor:
    """Factors [columns] that let any column come early, those that matter more often."""
    generator = torch.Generator().manual_seed(draw)
    return torch.randn(len(diagonal), generator=generator).exp_().to(diagonal)


def _quantize(
    wanted: Tensor, factor: Factor, size: int, levels: Levels
) -> tuple[Tensor, Tensor, Tensor]:
    """Steps [rows, columns] and scales [rows, groups] in solving order, and the loss [rows].

    What a column misses after feedback costs R_kk^2 times its square: in sum that is the loss on
    the damped Hessian.
    """
    steps, errors = torch.empty_like(wanted), torch.empty_like(wanted)
    feedback, cost, scales = factor.feedback.T, factor.cost, []
    damped = wanted.new_zeros(len(wanted))
    for start in range(0, wanted.shape[1], size):
        interrupt.check()
        group = slice(start, start + size)
        fed = torch.addmm(wanted[:, group], errors[:, :start], feedback[:start, group])
        offered = grid.offered(fed, levels)
        if size > _PANEL:  # too wide to try every scale with feedback
            offered = columns.best_rounding(fed, cost[group], offered, levels)[:, None]
        for first in range(start, start + size, _PANEL):
            panel = slice(first, min(first + _PANEL, start + size))
            inside = fed[:, first - start : panel.stop - start]
            inside = torch.addmm(inside, errors[:, start:first], feedback[start:first, panel])
            given = (wanted[:, panel], inside)
            steps[:, panel], errors[:, panel], scale, loss = columns.quantize(
                given, feedback[panel, panel], cost[panel], offered, levels
            )
            offered = scale[:, None]
            damped += loss
        scales.append(offered)
    return steps, torch.cat(scales, dim=1), (damped - errors.square_() @ factor.added).clamp_(min=0)


def _rounded(weight: Tensor, group: int, levels: Levels) -> tuple[Tensor, Tensor]:
    """Codes and scale of plain rounding. SolveError where either is not finite."""
    if not bool(torch.isfinite(weight).all()):
        raise SolveError("its weights are not finite")
    grouped = weight.reshape(-1, group if group > 0 else weight.shape[1])  # [rows * groups, size]
    scale = levels.stored(grid.largest_fits(grouped, levels))
    if not bool(torch.isfinite(scale).all()):
        kind = str(levels.dtype).removeprefix("torch.")
        raise SolveError(f"its weights are too large for scales in {kind}")
    codes = grid.to_steps(grouped, scale, levels).to(torch.int8).view(weight.shape)
    return codes, scale.view(weight.shape[0], -1)
