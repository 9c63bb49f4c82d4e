"""`solver.columns` and `solver.tiles`: both are the slow loops, row by row, on any threads.

The tiles are there on a GPU, or where Triton interprets them (see `test_tiles`).
"""

from __future__ import annotations

import hashlib
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import pytest
import torch
from torch import Tensor

from quant.solver import columns, grid, int8
from quant.solver.grid import Levels

pytestmark = pytest.mark.arithmetic

ROWS, SIZE = 40, 32
MOST_ROWS = 0.9  # a tie that sums of another order break the other way changes a whole row
INT4, INT8 = grid.full_range(4, torch.float16), grid.full_range(8, torch.bfloat16)
LEVELS = [INT4, INT8, int8.CHANNEL]

GPU = torch.cuda.is_available()


class Tiles:
    """Called as `columns` is, the tensors on a GPU where there is one."""

    def __init__(self) -> None:
        self.module = importlib.import_module("quant.solver.tiles")

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self.module, name)
        return lambda *args: moved(function(*moved(args, "cuda" if GPU else "cpu")), "cpu")


def moved(value: Any, where: str) -> Any:
    if isinstance(value, tuple):
        return tuple(moved(each, where) for each in value)
    return value.to(where) if isinstance(value, Tensor) else value


LOOPS: dict[str, Any] = {"compiled": columns}
if GPU or "TRITON_INTERPRET" in os.environ:
    LOOPS["tiles"] = Tiles()
each_loop = pytest.mark.parametrize("loops", list(LOOPS.values()), ids=list(LOOPS))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(
    levels: Levels, rows: int = ROWS
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, Tensor]:
    """Wanted and fed weights, feedback, cost, offered scales."""
    wanted = drawn(rows, SIZE)
    fed = wanted + 0.1 * drawn(rows, SIZE, seed=1)
    feedback = torch.eye(SIZE) + 0.3 * drawn(SIZE, SIZE, seed=2).triu(1)
    cost = drawn(SIZE, seed=3).square() + 0.1
    return (wanted, fed), feedback, cost, grid.offered(fed, levels)


def hessian() -> Tensor:
    inputs = drawn(200, SIZE, seed=4) @ drawn(SIZE, SIZE, seed=5)
    return inputs.T @ inputs / 200


def rounding_losses(weights: Tensor, cost: Tensor, scales: Tensor, levels: Levels) -> Tensor:
    """[rows, offered], in float64."""
    given, unit = weights.double()[:, None], scales.double()[..., None]  # [rows, offered, size]
    error = given - (given / unit).round().clamp(levels.low, levels.high) * unit
    return (error.square() * cost.double()).sum(dim=-1)


def feed_back(
    weights: tuple[Tensor, Tensor], feedback: Tensor, cost: Tensor, scale: Tensor, levels: Levels
) -> tuple[Tensor, Tensor, Tensor]:
    """Steps, errors and losses of all rows under scale [rows], column by column in float64."""
    wanted, left = weights[0].double(), weights[1].double().clone()
    steps, errors, unit = torch.empty_like(left), torch.empty_like(left), scale.double()
    loss = torch.zeros(len(left), dtype=torch.float64)
    for k in range(left.shape[1]):
        steps[:, k] = (left[:, k] / unit).round().clamp(levels.low, levels.high)
        loss += cost[k] * (left[:, k] - steps[:, k] * unit).square()
        errors[:, k] = wanted[:, k] - steps[:, k] * unit
        left[:, k + 1 :] += errors[:, k : k + 1] * feedback.double()[k, k + 1 :]
    return steps, errors, loss


def descended(
    steps: Tensor, scale: Tensor, gradient: Tensor, matrix: Tensor, levels: Levels
) -> tuple[Tensor, Tensor, Tensor]:
    moved, left, unit = steps.double().clone(), gradient.double().clone(), scale.double()
    dense = matrix.double()
    for k in range(SIZE):
        best = (moved[:, k] + left[:, k] / (dense[k, k] * unit)).round()
        change = best.clamp(levels.low, levels.high) - moved[:, k]
        moved[:, k] += change
        left -= (change * unit)[:, None] * dense[k]
    return moved, (moved * left).sum(dim=1), ((moved @ dense) * moved).sum(dim=1)


@each_loop
@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_steps_and_errors_are_those_of_the_slow_loop(loops: Any, levels: Levels) -> None:
    given, feedback, cost, offered = problem(levels)
    steps, errors, scale, loss = loops.quantize(given, feedback, cost, offered, levels)
    expected = feed_back(given, feedback, cost, scale, levels)
    same = (steps == expected[0]).all(dim=1)
    assert float(same.float().mean()) > MOST_ROWS  # float32 may break a tie the other way
    torch.testing.assert_close(errors[same].double(), expected[1][same], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss[same].double(), expected[2][same], rtol=1e-4, atol=0)
    assert levels.low <= float(steps.min()) and float(steps.max()) <= levels.high


@each_loop
@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_the_chosen_scales_feedback_costs_least_among_those_that_round_best(
    loops: Any,
    levels: Levels,
) -> None:
    given, feedback, cost, offered = problem(levels)
    _, _, scale, _ = loops.quantize(given, feedback, cost, offered, levels)
    order = rounding_losses(given[1], cost, offered, levels).argsort(dim=1)
    finalists = offered.gather(1, order[:, :4])
    tried = [feed_back(given, feedback, cost, one, levels)[2] for one in finalists.T]
    losses = torch.stack(tried, dim=1)  # [rows, finalists]
    of_chosen = feed_back(given, feedback, cost, scale, levels)[2]
    # float32 may see a tie for the last place among the finalists the other way.
    least = losses.amin(dim=1)
    assert float((of_chosen <= least * 1.0001).float().mean()) > MOST_ROWS
    assert bool((of_chosen <= least * 1.05).all())
    assert not torch.equal(scale, finalists[:, 0]), "trying finalists changes nothing"


@each_loop
@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_best_rounding_finds_the_least_loss_of_all_offered(loops: Any, levels: Levels) -> None:
    (_, weights), _, cost, offered = problem(levels)
    scale = loops.best_rounding(weights, cost, offered, levels)
    found = rounding_losses(weights, cost, scale[:, None], levels)[:, 0]
    least = rounding_losses(weights, cost, offered, levels).amin(dim=1)
    torch.testing.assert_close(found, least, rtol=1e-5, atol=0)
    assert bool((offered == scale[:, None]).any(dim=1).all())


@each_loop
@pytest.mark.parametrize("levels", LEVELS, ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_descent_is_that_of_the_slow_loop(loops: Any, levels: Levels, sign: float) -> None:
    weights, matrix = drawn(ROWS, SIZE), hessian()
    scale = sign * weights.abs().amax(dim=1) / levels.high
    steps = grid.to_steps(weights, scale, levels)
    gradient = (weights - steps * scale[:, None]) @ matrix
    ours = loops.descend(steps, scale, gradient, matrix, levels)
    slow = descended(steps, scale, gradient, matrix, levels)
    assert not torch.equal(ours[0], steps)
    same = (ours[0] == slow[0]).all(dim=1)
    assert float(same.float().mean()) > MOST_ROWS  # float32 may break a tie the other way
    for mine, theirs in zip(ours[1:], slow[1:], strict=True):
        size = float(theirs.abs().mean())
        torch.testing.assert_close(mine[same].double(), theirs[same], rtol=1e-3, atol=1e-4 * size)


if "tiles" in LOOPS:

    @pytest.mark.parametrize("panel", [8, 12, 128])
    def test_descent_in_panels_of_tiles_is_that_of_the_slow_loop(
        panel: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(LOOPS["tiles"].module, "_PANEL", panel)
        weights, matrix = drawn(ROWS, SIZE), hessian()
        scale = grid.largest_fits(weights, INT4)
        steps = grid.to_steps(weights, scale, INT4)
        given = steps, scale, (weights - steps * scale[:, None]) @ matrix, matrix, INT4
        found = LOOPS["tiles"].descend(*given)[0]
        same = (found == descended(*given)[0]).all(dim=1)
        assert float(same.float().mean()) > MOST_ROWS
        assert not torch.equal(found, steps)


def everything() -> list[Tensor]:
    """What each loop gives for the same inputs."""
    given, feedback, cost, offered = problem(INT4, rows=300)
    weights, matrix = given[0], hessian()
    scale = grid.largest_fits(weights, INT4)
    steps = grid.to_steps(weights, scale, INT4)
    gradient = (weights - steps * scale[:, None]) @ matrix
    return [
        *columns.quantize(given, feedback, cost, offered, INT4),
        *columns.quantize(*problem(int8.CHANNEL, rows=300), int8.CHANNEL),
        columns.best_rounding(weights, cost, offered, INT4),
        *columns.descend(steps, scale, gradient, matrix, INT4),
    ]


def digest() -> str:
    """Of what each loop gives."""
    numbers = b"".join(tensor.contiguous().numpy().tobytes() for tensor in everything())
    return hashlib.sha256(numbers).hexdigest()


def digest_elsewhere(**settings: str) -> str:
    """In a process of its own, with these in its environment."""
    program = "from tests.test_columns import digest; print(digest())"
    command = [sys.executable, "-c", program]
    digest = subprocess.check_output(command, env={**os.environ, **settings}, text=True)
    assert len(digest) > 60
    return digest


def test_the_number_of_threads_does_not_matter() -> None:
    one, two = (digest_elsewhere(NUMBA_NUM_THREADS=count) for count in "12")
    assert one == two


def test_code_out_of_the_cache_computes_what_just_compiled_code_does(tmp_path: Path) -> None:
    """To the bit: a run goes on where another process was stopped, and makes the same files."""
    compiled, cached = (digest_elsewhere(NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2))
    assert list(tmp_path.rglob("*.nbc")), "numba kept nothing"
    assert compiled == cached


@each_loop
def test_rows_do_not_meet(loops: Any) -> None:
    (wanted, fed), feedback, cost, offered = problem(INT4)
    whole = loops.quantize((wanted, fed), feedback, cost, offered, INT4)
    for row in (0, 17, ROWS - 1):
        only = slice(row, row + 1)
        given = (wanted[only], fed[only])
        alone = loops.quantize(given, feedback, cost, offered[only], INT4)
        assert all(torch.equal(a, b[only]) for a, b in zip(alone, whole, strict=True))


def untouched(inputs: list[Tensor], call: Callable[[], object]) -> bool:
    before = [tensor.clone() for tensor in inputs]
    call()
    return all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


@each_loop
def test_inputs_are_left_alone(loops: Any) -> None:
    given, feedback, cost, offered = problem(INT4)
    inputs = [*given, feedback, cost, offered]
    assert untouched(inputs, lambda: loops.quantize(given, feedback, cost, offered, INT4))
    assert untouched(inputs, lambda: loops.best_rounding(given[0], cost, offered, INT4))
    steps, scale = torch.zeros(ROWS, SIZE), torch.ones(ROWS)
    inputs = [steps, scale, gradient := drawn(ROWS, SIZE), matrix := hessian()]
    assert untouched(inputs, lambda: loops.descend(steps, scale, gradient, matrix, INT4))


def test_columns_out_of_a_wider_tensor_are_taken_as_they_are() -> None:
    (wanted, fed), feedback, cost, offered = problem(INT4)
    wide = torch.cat([drawn(ROWS, 5), wanted, fed], dim=1)
    parts = (wide[:, 5 : 5 + SIZE], wide[:, 5 + SIZE :])
    one = columns.quantize((wanted, fed), feedback, cost, offered, INT4)
    other = columns.quantize(parts, feedback, cost, offered, INT4)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_loops_are_compiled_where_nothing_can_be_kept() -> None:
    """numba finds no place beside code without a file, as beside an install that is read-only, with
    a home that is."""
    found: dict[str, Any] = {}
    exec("def twice(number):\n    return 2 * number\n", found)  # a function of no file
    with pytest.raises(RuntimeError, match="cannot cache function"):
        numba.njit(cache=True)(found["twice"])
    assert columns._built(found["twice"])(21) == 42
