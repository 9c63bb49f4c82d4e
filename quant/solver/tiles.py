"""The solver's inner loops for a GPU: a few rows of a panel of columns at a time, in registers.

The same as `columns`, as Triton kernels: a column is a sum over lanes instead of a launch. Float32
tensors in and out, on the device they are on; nothing waits for the host. Rows never meet.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton import language as tl

from quant.solver.grid import FINALISTS, Levels

_ROWS = 4  # of a warp: what they wait for alternates
_LANES = 32
_PANEL = 128  # columns that fit a warp's registers
_WORST = tl.constexpr(3.0e38)
_WHOLE = tl.constexpr(12582912.0)  # 1.5 * 2^23: next to it float32 has whole numbers only


def quantize(
    weights: tuple[Tensor, Tensor], feedback: Tensor, cost: Tensor, scales: Tensor, levels: Levels
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `columns.quantize`: steps and errors [rows, size], scale and cost [rows]."""
    wanted, fed = (each.contiguous() for each in weights)
    (rows, size), offered = wanted.shape, scales.shape[1]
    steps, errors = torch.empty_like(wanted), torch.empty_like(wanted)
    chosen, costs = wanted.new_empty(rows), wanted.new_empty(rows)
    given = wanted, fed, feedback.contiguous(), cost.contiguous(), scales.contiguous()
    with torch.cuda.device_of(wanted):
        _quantize[(triton.cdiv(rows, _ROWS),)](
            *given, steps, errors, chosen, costs, rows, size, offered, levels.low, levels.high,
            ROWS=_ROWS, WIDTH=_power(size), OFFERED=_power(offered),
            FINALISTS=min(FINALISTS, offered), num_warps=1,
        )  # fmt: skip
    return steps, errors, chosen, costs


def best_rounding(weights: Tensor, cost: Tensor, scales: Tensor, levels: Levels) -> Tensor:
    """As `columns.best_rounding`: of `scales` [rows, offered] the best [rows]; one scale at a time,
    for all of them at once would not fit a wide layer's memory."""
    losses = torch.empty_like(scales)
    for place, scale in enumerate(scales.T):
        steps = (weights / scale[:, None]).round_().clamp_(levels.low, levels.high)
        missed = weights.addcmul(steps, scale[:, None], value=-1)
        losses[:, place] = missed.square_() @ cost
    return scales.gather(1, losses.argmin(dim=1, keepdim=True))[:, 0]


def descend(
    steps: Tensor, scale: Tensor, gradient: Tensor, hessian: Tensor, levels: Levels
) -> tuple[Tensor, Tensor, Tensor]:
    """As `columns.descend`: the steps [rows, size], numerator and denominator [rows]."""
    moved, left, unit = steps.clone(), gradient.clone(), scale.contiguous()
    for start in range(0, steps.shape[1], _PANEL):
        panel = slice(start, start + _PANEL)
        given = (each[:, panel].contiguous() for each in (steps, left))
        inner, found = hessian[panel, panel].contiguous(), torch.empty_like(steps[:, panel])
        rows, size = found.shape
        with torch.cuda.device_of(found):
            _descend[(triton.cdiv(rows, _ROWS),)](
                *given, unit, inner, found, rows, size, levels.low, levels.high,
                ROWS=_ROWS, WIDTH=_power(size), num_warps=1,
            )  # fmt: skip
        change = (found - steps[:, panel]).mul_(unit[:, None])
        left.addmm_(change, hessian[panel], alpha=-1)
        moved[:, panel] = found
    return moved, (moved * left).sum(dim=1), ((moved @ hessian) * moved).sum(dim=1)


def _power(size: int) -> int:
    """The least power of two, as tiles have, that holds so many, and a lane each."""
    return max(1 << (size - 1).bit_length(), _LANES)


@triton.jit
def _nearest(number, low, high):
    """The nearest of the whole numbers low .. high, to even."""
    return tl.minimum(tl.maximum(number, low), high) + _WHOLE - _WHOLE


@triton.jit
def _column(tile, at):
    """One column [ROWS] of a tile [ROWS, WIDTH], whichever it is."""
    return tl.sum(tl.where(at, tile, 0.0), axis=1)


@triton.jit
def _quantize(  # noqa: PLR0913, PLR0915
    wanted_at, fed_at, feedback_at, cost_at, scales_at, steps_at, errors_at, chosen_at, costs_at,
    rows, size, offered, low, high,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, OFFERED: tl.constexpr, FINALISTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column, place = tl.arange(0, WIDTH)[None, :], tl.arange(0, OFFERED)[None, :]
    here, inside = row < rows, (row[:, None] < rows) & (column < size)
    tile = row[:, None].to(tl.int64) * size + column
    wanted, fed = tl.load(wanted_at + tile, inside, 0.0), tl.load(fed_at + tile, inside, 0.0)
    cost = tl.load(cost_at + column, column < size, 0.0)
    losses = tl.full((ROWS, OFFERED), _WORST, tl.float32)
    for one in range(offered):  # what rounding each column by itself would cost
        scale = tl.load(scales_at + row * offered + one, here, 1.0)[:, None]
        missed = fed - _nearest(fed / scale, low, high) * scale
        losses = tl.where(place == one, tl.sum(cost * missed * missed, axis=1)[:, None], losses)
    scale, least = tl.full((ROWS,), 1.0, tl.float32), tl.full((ROWS,), _WORST, tl.float32)
    steps = tl.zeros((ROWS, WIDTH), tl.float32)
    for _ in range(FINALISTS):
        best = tl.argmin(losses, axis=1)
        losses = tl.where(place == best[:, None], _WORST, losses)
        tried = tl.load(scales_at + row * offered + best, here, 1.0)
        left, made = fed, tl.zeros((ROWS, WIDTH), tl.float32)
        loss = tl.zeros((ROWS,), tl.float32)
        for k in range(size):
            at = column == k
            now = _column(left, at)
            step = _nearest(now / tried, low, high)
            missed, error = now - step * tried, _column(wanted, at) - step * tried
            loss += tl.load(cost_at + k) * missed * missed
            later = (column > k) & (column < size)
            left += error[:, None] * tl.load(feedback_at + k * size + column, later, 0.0)
            made = tl.where(at, step[:, None], made)
        better = loss < least
        scale, least = tl.where(better, tried, scale), tl.where(better, loss, least)
        steps = tl.where(better[:, None], made, steps)
    tl.store(steps_at + tile, steps, inside)
    tl.store(errors_at + tile, wanted - steps * scale[:, None], inside)
    tl.store(chosen_at + row, scale, here)
    tl.store(costs_at + row, least, here)


@triton.jit
def _descend(  # noqa: PLR0913
    steps_at, left_at, scale_at, hessian_at, found_at, rows, size, low, high,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    inside = (row[:, None] < rows) & (column < size)
    tile = row[:, None].to(tl.int64) * size + column
    steps, left = tl.load(steps_at + tile, inside, 0.0), tl.load(left_at + tile, inside, 0.0)
    unit = tl.load(scale_at + row, row < rows, 1.0)
    for k in range(size):
        at = column == k
        now = _column(steps, at)
        best = now + _column(left, at) / (tl.load(hessian_at + k * size + k) * unit)
        best = _nearest(best, low, high)
        hessian = tl.load(hessian_at + k * size + column, column < size, 0.0)
        left -= ((best - now) * unit)[:, None] * hessian
        steps = tl.where(at, best[:, None], steps)
    tl.store(found_at + tile, steps, inside)
