"""The solver's inner loops for an accelerator: the same as `columns`, every row at once.

Float32 tensors in and out, on the device they are on, and nothing waits for the host. A column is a
handful of launches over all rows; what a compiled loop keeps in registers goes through memory here,
so on a CPU it is the slower of the two. Rows never meet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.solver.grid import FINALISTS, Levels


def quantize(
    weights: tuple[Tensor, Tensor], feedback: Tensor, cost: Tensor, scales: Tensor, levels: Levels
) -> tuple[Tensor, Tensor, Tensor]:
    """As `columns.quantize`: steps and errors [rows, size] and the scale [rows]."""
    losses = _rounding_losses(weights[1], cost, scales, levels)
    finalists = losses.topk(min(FINALISTS, scales.shape[1]), dim=1, largest=False).indices
    tried = scales.gather(1, finalists)  # [rows, finalists]
    steps, errors, loss = _fed_back(weights, feedback, cost, tried, levels)
    best = loss.argmin(dim=1, keepdim=True)
    row = best[..., None].expand(-1, 1, steps.shape[2])
    chosen = tried.gather(1, best)[:, 0]
    return steps.gather(1, row)[:, 0], errors.gather(1, row)[:, 0], chosen


def best_rounding(weights: Tensor, cost: Tensor, scales: Tensor, levels: Levels) -> Tensor:
    """As `columns.best_rounding`: of `scales` [rows, offered] the best [rows]."""
    best = _rounding_losses(weights, cost, scales, levels).argmin(dim=1, keepdim=True)
    return scales.gather(1, best)[:, 0]


def descend(
    steps: Tensor, scale: Tensor, gradient: Tensor, hessian: Tensor, levels: Levels
) -> tuple[Tensor, Tensor, Tensor]:
    """As `columns.descend`: the steps [rows, size], numerator and denominator [rows]."""
    moved, left = steps.clone(), gradient.clone()
    for k, (row, stiffness) in enumerate(zip(hessian, hessian.diagonal(), strict=True)):
        best = (moved[:, k] + left[:, k] / (stiffness * scale)).round_()
        change = best.clamp_(levels.low, levels.high) - moved[:, k]
        moved[:, k] += change
        left.addcmul_((change * scale)[:, None], row, value=-1)
    return moved, (moved * left).sum(dim=1), ((moved @ hessian) * moved).sum(dim=1)


def _rounding_losses(weights: Tensor, cost: Tensor, scales: Tensor, levels: Levels) -> Tensor:
    """[rows, offered]: what rounding each column by itself would cost; one scale at a time, for
    all of them at once would not fit a wide layer's memory."""
    losses = torch.empty_like(scales)
    for place, scale in enumerate(scales.T):
        steps = (weights / scale[:, None]).round_().clamp_(levels.low, levels.high)
        missed = weights.addcmul(steps, scale[:, None], value=-1)
        losses[:, place] = missed.square_() @ cost
    return losses


def _fed_back(
    weights: tuple[Tensor, Tensor], feedback: Tensor, cost: Tensor, tried: Tensor, levels: Levels
) -> tuple[Tensor, Tensor, Tensor]:
    """Steps and errors [rows, tried, size] under each of the scales `tried` [rows, tried], column
    by column, each error fed to the columns after it; and what each would cost [rows, tried]."""
    wanted, fed = weights
    left = fed[:, None].repeat(1, tried.shape[1], 1)
    steps, errors = torch.empty_like(left), torch.empty_like(left)
    loss = torch.zeros_like(tried)
    for k in range(wanted.shape[1]):
        steps[..., k] = (left[..., k] / tried).round_().clamp_(levels.low, levels.high)
        rounded = steps[..., k] * tried
        loss.addcmul_((left[..., k] - rounded).square_(), cost[k])
        errors[..., k] = wanted[:, k, None] - rounded
        left[..., k + 1 :].addcmul_(errors[..., k, None], feedback[k, k + 1 :])
    return steps, errors, loss
