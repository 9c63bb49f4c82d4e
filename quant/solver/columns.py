"""The solver's inner loops, compiled: one group of columns at a time, every row for itself.

Float32 tensors in and out; tensors on a GPU go to `tiles` instead. Rows run in parallel
and never meet, so the result does not depend on the number of threads. The innermost loops run
along memory without branches, which lets the compiler turn them into vector code; numba keeps what
it compiled for the next run where it can.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

import numba
import numpy as np
import torch
from numba import njit, prange
from numpy.typing import NDArray
from torch import Tensor

from quant.solver.grid import FINALISTS, Levels

Floats = NDArray[np.float32]
Three = tuple[Tensor, Tensor, Tensor]
Four = tuple[Tensor, Tensor, Tensor, Tensor]
Limits = tuple[np.float32, np.float32]  # the lowest and the highest step
_Loop = TypeVar("_Loop", bound=Callable[..., object])

_ONE, _ZERO = np.float32(1), np.float32(0)
_MOST_LANES = 128  # what they hold of a group of 128 columns fits a core's second-level cache
# All of LLVM's fast mathematics but fusing a product with a sum: code out of numba's cache fuses
# others than code that was just compiled, and sums in another order (see `_in_order`), and the next
# run would not make the same files.
_FAST = {"nnan", "ninf", "nsz", "arcp", "afn", "reassoc"}
_WORST = np.finfo(np.float32).max  # fastmath promises the compiler that no infinity is met


def quantize(
    weights: tuple[Tensor, Tensor], feedback: Tensor, cost: Tensor, scales: Tensor, levels: Levels
) -> Four:
    """Steps and errors [rows, size], the scale [rows] and what it costs [rows], of one group of
    columns.

    `weights` are [rows, size]: wanted, and wanted plus what earlier columns fed into them;
    `feedback` [size, size] holds at [k, later] what an error in column k adds to a later column;
    `cost` [size] is what an error in a column costs; `scales` [rows, offered]. A row takes the
    offered scale whose feedback pass costs least, out of the few that round best.
    """
    if cost.is_cuda:
        return _on_gpu().quantize(weights, feedback, cost, scales, levels)
    given = (_array(weights[0]), _array(weights[1]))
    known = (_array(feedback), _array(cost))
    lanes = _lanes(len(scales))
    found = _quantize_rows(given, known, _array(scales), _limits(levels), lanes)
    steps, errors, chosen, costs = map(torch.from_numpy, found)
    return steps, errors, chosen, costs


def best_rounding(weights: Tensor, cost: Tensor, scales: Tensor, levels: Levels) -> Tensor:
    """Of `scales` [rows, offered], the one [rows] under which rounding `weights` costs least."""
    if cost.is_cuda:
        return _on_gpu().best_rounding(weights, cost, scales, levels)
    found = _best_rounding_rows(_array(weights), _array(cost), _array(scales), _limits(levels))
    return torch.from_numpy(found)


def descend(
    steps: Tensor, scale: Tensor, gradient: Tensor, hessian: Tensor, levels: Levels
) -> Three:
    """Moves each step of one group to where the loss is least, the others held.

    `steps` [rows, size]; `scale` [rows]; `gradient` [rows, size] is the rows' error times the
    Hessian's columns; `hessian` [size, size]. Returns the steps, and for each row the numerator
    and the denominator [rows] of the change of scale that would then be best.
    """
    if steps.is_cuda:
        return _on_gpu().descend(steps, scale, gradient, hessian, levels)
    arrays = _array(steps).copy(), _array(scale), _array(gradient), _array(hessian)
    moved, matched, energy = map(torch.from_numpy, _descend_rows(*arrays, _limits(levels)))
    return moved, matched, energy


class _Loops(Protocol):
    """What this module offers."""

    quantize: Callable[[tuple[Tensor, Tensor], Tensor, Tensor, Tensor, Levels], Four]
    best_rounding: Callable[[Tensor, Tensor, Tensor, Levels], Tensor]
    descend: Callable[[Tensor, Tensor, Tensor, Tensor, Levels], Three]


def _on_gpu() -> _Loops:
    """The same for tensors there; needs Triton, which torch's builds for GPUs bring."""
    return cast(_Loops, importlib.import_module("quant.solver.tiles"))


def _array(tensor: Tensor) -> Floats:
    found: Floats = tensor.contiguous().numpy()
    return found


def _limits(levels: Levels) -> Limits:
    return np.float32(levels.low), np.float32(levels.high)


def _lanes(rows: int) -> int:
    """Rows that go through a group's columns in step: many, since a vector loop has to be long to
    be worth its start, in blocks that are spread evenly over the threads."""
    threads = int(numba.get_num_threads())
    return math.ceil(rows / (threads * math.ceil(rows / (threads * _MOST_LANES))))


def _built(loop: _Loop, **how: Any) -> _Loop:
    """Compiled when it is first called. What was compiled is kept beside this file, or in the home,
    for the next run; where neither can be written to, each run compiles anew, the same code."""
    try:
        return cast(_Loop, njit(cache=True, error_model="numpy", **how)(loop))
    except RuntimeError:  # numba's, which looks for a place right here
        return cast(_Loop, njit(error_model="numpy", **how)(loop))


def _compiled(loop: _Loop) -> _Loop:
    return _built(loop, fastmath=_FAST)


def _in_order(loop: _Loop) -> _Loop:
    """For sums that decide what is stored: summed in any order they differ from run to run."""
    return _built(loop)


def _parallel(loop: _Loop) -> _Loop:
    return _built(loop, parallel=True, fastmath=_FAST)


@_compiled
def _rounding_loss(weights: Floats, scale: np.float32, cost: Floats, limits: Limits) -> np.float32:
    """What rounding each column by itself would cost."""
    low, high = limits
    inverse, loss = _ONE / scale, _ZERO
    for k in range(weights.size):
        missed = weights[k] - min(max(np.rint(weights[k] * inverse), low), high) * scale
        loss += cost[k] * missed * missed
    return loss


@_compiled
def _turned(matrix: Floats, first: int, lanes: int) -> Floats:
    """So many rows from `first` on as columns [size, lanes]: what they do in step lies side by side
    in memory. Behind the last row comes that again."""
    rows, size = matrix.shape
    turned = np.empty((size, lanes), np.float32)
    for lane in range(lanes):
        row = min(first + lane, rows - 1)
        for k in range(size):
            turned[k, lane] = matrix[row, k]
    return turned


@_compiled
def _finalists(
    weights: Floats, cost: Floats, scales: Floats, limits: Limits, block: tuple[int, int]
) -> Floats:
    """Of the offered `scales` of a block's rows those that round best [finalists, lanes]."""
    first, lanes = block
    found = np.empty((min(FINALISTS, scales.shape[1]), lanes), np.float32)
    losses = np.empty(scales.shape[1], np.float32)
    for lane in range(lanes):
        row = min(first + lane, len(scales) - 1)
        for place in range(losses.size):
            losses[place] = _rounding_loss(weights[row], scales[row, place], cost, limits)
        for final in range(len(found)):
            place = int(np.argmin(losses))
            losses[place], found[final, lane] = _WORST, scales[row, place]
    return found


@_compiled
def _feed_back(
    given: tuple[Floats, Floats],
    made: tuple[Floats, Floats],
    known: tuple[Floats, Floats],
    scale: Floats,
    limits: Limits,
) -> Floats:
    """Rounds a group in each lane column by column, each error fed to the columns after it.

    What is `given` is wanted and already fed (read), what is `made` are steps and errors
    (written), all [size, lanes]; `known` are feedback and cost. Returns what it costs [lanes].
    """
    (wanted, fed), (steps, errors), (feedback, cost), (low, high) = given, made, known, limits
    inverse, loss = _ONE / scale, np.zeros_like(scale)
    left = fed.copy()
    for k in range(len(wanted)):
        for lane in range(scale.size):
            step = min(max(np.rint(left[k, lane] * inverse[lane]), low), high)
            missed = left[k, lane] - step * scale[lane]
            loss[lane] += cost[k] * missed * missed
            steps[k, lane], errors[k, lane] = step, wanted[k, lane] - step * scale[lane]
        for later in range(k + 1, len(wanted)):
            for lane in range(scale.size):
                left[later, lane] += feedback[k, later] * errors[k, lane]
    return loss


@_in_order
def _product(one: Floats, other: Floats) -> np.float32:
    """The sum of one * other."""
    total = _ZERO
    for k in range(one.size):
        total += one[k] * other[k]
    return total


@_parallel
def _best_rounding_rows(weights: Floats, cost: Floats, scales: Floats, limits: Limits) -> Floats:
    rows = weights.shape[0]
    chosen = np.empty(rows, np.float32)
    for row in prange(rows):
        best = _WORST
        for place in range(scales.shape[1]):
            loss = _rounding_loss(weights[row], scales[row, place], cost, limits)
            if loss < best:
                best, chosen[row] = loss, scales[row, place]
    return chosen


@_parallel
def _quantize_rows(
    weights: tuple[Floats, Floats],
    known: tuple[Floats, Floats],
    scales: Floats,
    limits: Limits,
    lanes: int,
) -> tuple[Floats, Floats, Floats, Floats]:
    rows, size = weights[0].shape
    steps, errors = np.empty_like(weights[0]), np.empty_like(weights[0])
    chosen, costs = np.empty(rows, np.float32), np.empty(rows, np.float32)
    for block in prange((rows + lanes - 1) // lanes):
        first = block * lanes
        tried = _finalists(weights[1], known[1], scales, limits, (first, lanes))
        given = (_turned(weights[0], first, lanes), _turned(weights[1], first, lanes))
        made = (np.empty_like(given[0]), np.empty_like(given[0]))
        best = np.full(lanes, _WORST)
        for final in range(len(tried)):
            loss = _feed_back(given, made, known, tried[final], limits)
            for lane in range(min(lanes, rows - first)):
                if loss[lane] < best[lane]:
                    best[lane], chosen[first + lane] = loss[lane], tried[final, lane]
                    for k in range(size):
                        steps[first + lane, k] = made[0][k, lane]
                        errors[first + lane, k] = made[1][k, lane]
        costs[first : first + lanes] = best[: rows - first]
    return steps, errors, chosen, costs


@_parallel
def _descend_rows(
    steps: Floats, scale: Floats, gradient: Floats, hessian: Floats, limits: Limits
) -> tuple[Floats, Floats, Floats]:
    rows, size = steps.shape
    low, high = limits
    matched, energy = np.empty(rows, np.float32), np.empty(rows, np.float32)
    for row in prange(rows):
        step, left, unit = steps[row], gradient[row].copy(), scale[row]
        for k in range(size):
            best = min(max(np.rint(step[k] + left[k] / (hessian[k, k] * unit)), low), high)
            if best != step[k]:
                moved = (best - step[k]) * unit
                step[k] = best
                for other in range(size):
                    left[other] -= moved * hessian[k, other]
        along = np.zeros_like(step)
        for k in range(size):
            for other in range(size):
                along[other] += step[k] * hessian[k, other]
        matched[row], energy[row] = _product(step, left), _product(step, along)
    return steps, matched, energy
