"""`solver.descent`: steps and scales only ever move downhill, and targets towards the parent."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant.solver import descent, gptq, grid, int8
from quant.solver.gptq import Solution
from quant.solver.grid import Levels
from quant.solver.moments import Moments
from tests.test_gptq import CASES, INT4, correlated, drawn, output_loss
from tests.test_moments import drifted, moments

pytestmark = pytest.mark.arithmetic

ROWS, COLUMNS, DAMPING = 24, 64, 0.01
INT8 = grid.full_range(8, torch.bfloat16)


def ridged(hessian: Tensor) -> Tensor:
    return hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))


def quadratic(target: Tensor, codes: Tensor, scale: Tensor, hessian: Tensor) -> Tensor:
    """[rows], in float64."""
    error = (target - gptq.dequantize(codes, scale)).double()
    return ((error @ hessian.double()) * error).sum(dim=1)


def plain(weight: Tensor, group: int, levels: Levels) -> tuple[Tensor, Tensor]:
    """Codes and scales of plain rounding, every other group's scale turned over."""
    grouped = weight.view(-1, group if group > 0 else weight.shape[1])
    scale = levels.stored(grid.largest_fits(grouped, levels))
    scale[1::2] *= -1
    codes = grid.to_steps(grouped, scale, levels).to(torch.int8).view(weight.shape)
    return codes, scale.view(len(weight), -1)


def test_no_token_counts_for_more_than_a_few_ordinary_ones() -> None:
    """Over all batches together: each batch's first token is a thousand times as large."""
    batches = [drawn(30, COLUMNS, seed=seed) for seed in range(3)]
    for batch in batches:
        batch[0] *= 1000
    even = descent.evening(batches)
    energy = torch.cat([rows.square().sum(dim=1) for rows in batches])
    evened = torch.cat([(r * by).square().sum(dim=1) for r, by in zip(batches, even, strict=True)])
    most = 4 * float(energy.median())
    assert float(evened.max()) <= most * 1.0001
    assert torch.equal(evened[energy <= most], energy[energy <= most])
    for by in even:
        assert by.shape == (30, 1) and float(by[0]) < 0.01 and bool((by[1:] == 1).all())


@pytest.mark.parametrize("batches", [[(0, 8)], [(3, 8), (4, 8)]])
def test_where_no_token_is_ordinary_all_count_alike(batches: list[tuple[int, int]]) -> None:
    even = descent.evening([torch.zeros(shape) for shape in batches])
    assert [by.tolist() for by in even] == [[[1.0]] * rows for rows, _ in batches]


def test_a_target_moved_by_both_comes_nearest_to_what_the_stream_should_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Held-out tokens that are the fitted ones: all that can be had of the gap is had, in as many
    rows at a time as there may be."""
    weight, inputs = drawn(ROWS, COLUMNS, seed=1), correlated(300, COLUMNS)
    gap = inputs @ drawn(ROWS, COLUMNS, seed=2).T + drawn(300, ROWS, seed=3)
    fitted, held = Moments(weight, adds=True), Moments(weight, adds=True)
    for each in (fitted, held):
        each.add(inputs, inputs, gap)
    factor = gptq.factorize(fitted.hessian.mean(), 1e-5, 32)
    target = descent.shifted(weight, weight, fitted.lack(), held, factor)
    best = torch.linalg.lstsq(inputs.double(), (gap + inputs @ weight.T).double()).solution.T
    torch.testing.assert_close(target.double(), best, rtol=1e-2, atol=1e-2)
    again = descent.shifted(weight, target, fitted.lack(), held, factor)
    torch.testing.assert_close(again, target, rtol=1e-2, atol=1e-2)  # nothing is asked for twice
    monkeypatch.setitem(descent.PART, "cpu", COLUMNS * 3)
    parts = descent.shifted(weight, weight, fitted.lack(), held, factor)
    torch.testing.assert_close(parts, target, rtol=1e-2, atol=1e-2)


def missed(weight: Tensor, served: Tensor, parent: Tensor, original: Tensor) -> float:
    """|x w' - p w|^2 over tokens and rows."""
    return float((served @ weight.T - parent @ original.T).double().square().sum())


@pytest.mark.parametrize("size", [0.02, 0.3, 1.0])
def test_a_shifted_target_comes_nearer_to_the_parents_outputs(size: float) -> None:
    weight = drawn(ROWS, COLUMNS, seed=1)
    fitted, held = drifted(500, size=size), drifted(100, seed=20, size=size)
    known, told = moments(*fitted, weight), moments(*held, weight)
    factor = gptq.factorize(known.hessian.mean(), DAMPING, 32)
    target = descent.shifted(weight, weight, known.pull(), told, factor)
    for inputs in (fitted, held, drifted(300, seed=40, size=size)):
        assert missed(target, *inputs, weight) < 0.9 * missed(weight, *inputs, weight)


def strength(weight: Tensor, target: Tensor, fitted: Moments) -> float:
    """How much of the whole way, w D H^-1 of the damped H, was gone."""
    factor = gptq.factorize(fitted.hessian.mean(), DAMPING, 32)
    way = factor.solved(fitted.pull()).double()
    gone = (target - weight).double()
    share = float((gone * way).sum() / way.square().sum())
    assert float((gone - share * way).norm()) <= 1e-3 * float(way.norm()) + 1e-4
    return share


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(5, 300), st.integers(1, 50), st.floats(0.01, 3))
def test_the_strength_is_best_on_held_out_tokens_and_within_bounds(
    seed: int, tokens: int, kept: int, size: float
) -> None:
    weight = drawn(ROWS, COLUMNS, seed=seed)
    fitted, held = drifted(tokens, seed, size), drifted(kept, seed + 50, size)
    held = (held[0], held[1] - 2 * (seed % 2) * (held[1] - held[0]))  # odd: the opposite drift
    known = moments(*fitted, weight)
    factor = gptq.factorize(known.hessian.mean(), DAMPING, 32)
    target = descent.shifted(weight, weight, known.pull(), moments(*held, weight), factor)
    assert -1e-4 <= (share := strength(weight, target, known)) <= 1 + 1e-4
    least = missed(target, *held, weight)
    way = factor.solved(known.pull())
    for other in torch.linspace(0, 1, 11).tolist():
        assert least <= missed(weight + other * way, *held, weight) * (1 + 1e-4), (share, other)


def test_a_drift_the_held_out_tokens_deny_moves_nothing() -> None:
    weight, (served, parent) = drawn(ROWS, COLUMNS), drifted(300)
    fitted, denied = moments(served, parent, weight), moments(parent, served, weight)
    factor = gptq.factorize(fitted.hessian.mean(), DAMPING, 32)
    assert torch.equal(descent.shifted(weight, weight, fitted.pull(), denied, factor), weight)


@pytest.mark.parametrize("kept", [0, 40])
def test_inputs_that_agree_leave_the_weight_itself(kept: int) -> None:
    weight, inputs = drawn(ROWS, COLUMNS), correlated(200, COLUMNS)
    fitted, held = moments(inputs, inputs, weight), moments(inputs[:kept], None, weight)
    factor = gptq.factorize(fitted.hessian.mean(), DAMPING, 32)
    assert torch.equal(descent.shifted(weight, weight, fitted.pull(), held, factor), weight)


def test_without_held_out_tokens_the_weight_stays() -> None:
    fitted = moments(*drifted(100), weight := drawn(ROWS, COLUMNS))
    factor = gptq.factorize(fitted.hessian.mean(), DAMPING, 32)
    assert torch.equal(
        descent.shifted(weight, weight, fitted.pull(), Moments(weight), factor), weight
    )


def test_held_out_tokens_of_zeros_tell_no_more_than_none() -> None:
    fitted, silent = moments(*drifted(100), weight := drawn(ROWS, COLUMNS)), Moments(weight)
    silent.add(torch.zeros(5, COLUMNS), torch.zeros(5, COLUMNS))
    factor = gptq.factorize(fitted.hessian.mean(), DAMPING, 32)
    assert torch.equal(descent.shifted(weight, weight, fitted.pull(), silent, factor), weight)
    start = gptq.solve(weight, fitted.hessian.mean(), factor, 32, INT4)
    found = (
        descent.improved(weight, start, (fitted.hessian.mean(), held), INT4)
        for held in (silent, Moments(weight))
    )
    first, second = found
    assert torch.equal(first.codes, second.codes) and torch.equal(first.scale, second.scale)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(CASES), st.sampled_from([1, 3]))
def test_descent_never_raises_the_loss_of_a_row(
    seed: int, case: tuple[Levels, int], tail: int
) -> None:
    (levels, group), weight = case, drawn(ROWS, 128, seed=seed) ** tail
    inputs = correlated(300, seed=seed)
    hessian = inputs.T @ inputs / 300
    start = plain(weight, group, levels)
    codes, scale, moved = descent.descend(weight, hessian, start, levels)
    before = quadratic(weight, *start, ridged(hessian))
    after = quadratic(weight, codes, scale, ridged(hessian))
    assert bool((after <= before * (1 + 1e-4)).all())
    assert float(after.sum()) < 0.9 * float(before.sum())
    lost = quadratic(weight, codes, scale, hessian) - quadratic(weight, *start, hessian)
    torch.testing.assert_close(
        moved, lost.to(moved.dtype), rtol=1e-3, atol=1e-4 * float(before.max())
    )


@pytest.mark.parametrize(("levels", "group"), CASES)
def test_what_descent_finds_can_be_stored(levels: Levels, group: int) -> None:
    weight, inputs = drawn(ROWS, 128) * 0.02, correlated(300)
    start = plain(weight, group, levels)
    before = [tensor.clone() for tensor in start]
    codes, scale, _ = descent.descend(weight, inputs.T @ inputs / 300, start, levels)
    assert codes.dtype == torch.int8 and codes.shape == weight.shape
    assert levels.low <= int(codes.min()) and int(codes.max()) <= levels.high
    assert torch.equal(scale, scale.to(levels.dtype).float())
    assert torch.equal(scale.sign(), start[1].sign())
    # With 8 bits the fit asks for changes finer than bfloat16 can store.
    refits = not (levels.dtype == torch.bfloat16 and group == 128)
    for turned in (start[1] > 0, start[1] < 0):
        assert bool((scale != start[1])[turned].any()) is refits
    assert all(torch.equal(a, b) for a, b in zip(before, start, strict=True))


@pytest.mark.parametrize("levels", [INT4, INT8, int8.CHANNEL], ids=str)
def test_in_the_end_no_single_step_can_be_bettered(levels: Levels) -> None:
    weight, inputs = drawn(ROWS, 32), correlated(100, 32)
    hessian, group = inputs.T @ inputs / 100, -1 if levels is int8.CHANNEL else 16
    codes, scale, _ = descent.descend(weight, hessian, plain(weight, group, levels), levels)
    for _ in range(100):
        again = descent.descend(weight, hessian, (codes, scale), levels)
        if torch.equal(again[0], codes) and torch.allclose(again[1], scale, rtol=1e-6):
            break
        codes, scale, _ = again
    else:
        pytest.fail("descent does not settle")
    least = quadratic(weight, codes, scale, ridged(hessian))
    for column in range(32):
        for by in (-1, 1):
            moved = codes.clone()
            moved[:, column] = (codes[:, column].int() + by).clamp(levels.low, levels.high)
            loss = quadratic(weight, moved, scale, ridged(hessian))
            assert bool((loss >= least * (1 - 1e-5)).all()), (column, by)


def start_of(target: Tensor, served: Tensor, group: int, levels: Levels) -> Solution:
    matrix = moments(served).hessian.mean()
    factor = gptq.factorize(matrix, DAMPING, group)
    return gptq.solve(target, matrix, factor, group, levels)


@pytest.mark.parametrize(("levels", "group"), CASES)
@pytest.mark.parametrize("tokens", [40, 400])
def test_an_improved_row_is_better_on_fitted_and_on_held_out_tokens(
    levels: Levels, group: int, tokens: int
) -> None:
    """With few tokens the descent fits them alone, and rows keep what they started with."""
    target, fitted, held = drawn(60, 128), correlated(tokens), correlated(60, seed=30)
    start = start_of(target, fitted, group, levels)
    done = descent.improved(target, start, (moments(fitted).hessian.mean(), moments(held)), levels)
    changed = (done.codes != start.codes).any(dim=1) | (done.scale != start.scale).any(dim=1)
    assert int(changed.sum()) > 0
    for inputs in (fitted, held):
        before = output_loss(inputs, target, start.weight())
        after = output_loss(inputs, target, done.weight())
        assert bool((after[changed] < before[changed] * (1 + 1e-5)).all())
    told = output_loss(fitted, target, done.weight())
    torch.testing.assert_close(done.loss.double(), told, rtol=1e-3, atol=1e-3 * float(told.mean()))
    assert torch.equal(done.rounding_loss, start.rounding_loss)
    if tokens == 40:
        assert int((~changed).sum()) > 0, "no row was held back"


def test_without_held_out_tokens_the_fitted_ones_decide() -> None:
    target, fitted = drawn(60, 128), correlated(40)
    start = start_of(target, fitted, 32, INT4)
    matrix = moments(fitted).hessian.mean()
    free = descent.improved(target, start, (matrix, Moments(target)), INT4)
    held = descent.improved(target, start, (matrix, moments(correlated(9))), INT4)
    assert float(free.loss.sum()) < float(held.loss.sum()) < float(start.loss.sum())
