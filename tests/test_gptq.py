"""`solver.gptq`: the textbook's codes, losses that are true, and refusals instead of rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant.errors import SolveError
from quant.solver import gptq, grid, int8
from quant.solver.gptq import Solution
from quant.solver.grid import Levels
from quant.solver.moments import Hessian

pytestmark = pytest.mark.arithmetic

ROWS, COLUMNS, DAMPING = 48, 128, 0.01
# Codes, and rows: a tie that sums of another order break the other way changes a whole row.
NEARLY_ALL, MOST_ROWS = 0.98, 0.9
INT4, INT8 = grid.full_range(4, torch.float16), grid.full_range(8, torch.bfloat16)
CASES = [(INT4, 32), (INT4, 64), (INT4, -1), (INT8, 32), (INT8, 128), (int8.CHANNEL, -1)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int = 600, columns: int = COLUMNS, seed: int = 0) -> Tensor:
    """Inputs as layers see them: a few directions carry most, a few columns are large."""
    inputs = drawn(tokens, columns // 4, seed=seed) @ drawn(columns // 4, columns, seed=seed + 1)
    inputs += 0.5 * drawn(tokens, columns, seed=seed + 2)
    inputs[:, ::17] *= 5
    return inputs


def hessian_of(inputs: Tensor) -> Tensor:
    hessian = Hessian(inputs.shape[1])
    hessian.add(inputs)
    return hessian.mean()


def solved(weight: Tensor, hessian: Tensor, group: int, levels: Levels) -> Solution:
    factor = gptq.factorize(hessian, DAMPING, group)
    return gptq.solve(weight, hessian, factor, group, levels)


def output_loss(inputs: Tensor, weight: Tensor, served: Tensor) -> Tensor:
    """[rows]: mean squared error of a layer's outputs, from the inputs themselves."""
    return (inputs.double() @ (weight.double() - served.double()).T).square().mean(dim=0)


def plainly_rounded(weight: Tensor, group: int, levels: Levels) -> Tensor:
    """Nearest codes under the scale that fits the largest weight; float32 [rows, columns]."""
    grouped = weight.reshape(len(weight), -1, group if group > 0 else weight.shape[1])
    scale = grouped.abs().amax(dim=2, keepdim=True) / ((levels.high - levels.low) / 2)
    scale = scale.to(levels.dtype).float()
    return ((grouped / scale).round().clamp(levels.low, levels.high) * scale).flatten(1)


def textbook(weight: Tensor, hessian: Tensor, scale: Tensor, order: Tensor, low: int) -> Tensor:
    """Frantar et al., algorithm 1: column by column with the inverse Hessian's Cholesky factor.

    float64, codes [rows, columns] for given scales [rows, groups] and a given column order.
    """
    damped = hessian.double()
    dead = damped.diagonal() == 0
    mean = damped.diagonal().mean()
    damped = damped + torch.diag(dead * mean) + DAMPING * mean * torch.eye(len(damped))
    upper = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    left = weight.double()[:, order]
    scales = scale.double().repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)[:, order]
    codes = torch.empty_like(left)
    for j in range(left.shape[1]):
        codes[:, j] = (left[:, j] / scales[:, j]).round().clamp(low, -low if low == -127 else ~low)
        error = (left[:, j] - codes[:, j] * scales[:, j]) / upper[j, j]
        left[:, j:] -= error[:, None] * upper[j, j:]
    return codes[:, order.argsort()]


@pytest.mark.parametrize(("levels", "group"), CASES)
@pytest.mark.parametrize("dead", [[], [3, 70]])
def test_codes_are_the_textbooks(levels: Levels, group: int, dead: list[int]) -> None:
    weight, inputs = drawn(ROWS, COLUMNS, seed=9) * 0.05, correlated()
    inputs[:, dead] = 0
    hessian = hessian_of(inputs)
    factor = gptq.factorize(hessian, DAMPING, group)
    solution = gptq.solve(weight, hessian, factor, group, levels)
    assert factor.damping == DAMPING and factor.dead == len(dead)
    expected = textbook(weight, hessian, solution.scale, factor.order, levels.low)
    assert bool((solution.scale < 0).any()) is (levels.bits == 4)
    same = (solution.codes == expected).all(dim=1)
    # float32 may break a tie between two codes the other way, and the row goes on from there.
    assert int((~same).sum()) <= 1


@pytest.mark.parametrize(("levels", "group"), CASES)
def test_reported_losses_are_those_of_the_outputs(levels: Levels, group: int) -> None:
    weight, inputs = drawn(ROWS, COLUMNS, seed=9) * 0.05, correlated()
    solution = solved(weight, hessian_of(inputs), group, levels)
    told = (solution.loss.double(), solution.rounding_loss.double())
    rounded = plainly_rounded(weight, group, levels)
    found = (output_loss(inputs, weight, solution.weight()), output_loss(inputs, weight, rounded))
    torch.testing.assert_close(told, found, rtol=1e-3, atol=0)
    assert float(solution.loss.sum()) < 0.5 * float(solution.rounding_loss.sum())


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(CASES), st.integers(1, 100), st.sampled_from([1, 3]))
def test_no_row_is_worse_than_plain_rounding(
    seed: int, case: tuple[Levels, int], tokens: int, tail: int
) -> None:
    (levels, group), weight = case, drawn(ROWS, COLUMNS, seed=seed) ** tail
    inputs = correlated(tokens, seed=seed)
    solution = solved(weight, hessian_of(inputs), group, levels)
    rounded = output_loss(inputs, weight, plainly_rounded(weight, group, levels))
    # With one token the errors of a row can cancel by chance to less than float32 resolves.
    slack = 1e-4 * float(rounded.mean())
    assert bool((output_loss(inputs, weight, solution.weight()) <= rounded * 1.001 + slack).all())


def test_a_row_that_rounding_serves_better_keeps_rounding() -> None:
    """One token, heavily damped: rounding's errors happen to cancel on it in some of many rows."""
    weight, hessian = drawn(4000, 32), hessian_of(drawn(1, 32))
    factor = gptq.factorize(hessian, 1.0, 32)
    solution = gptq.solve(weight, hessian, factor, 32, INT4)
    kept = solution.loss == solution.rounding_loss
    assert 0 < int(kept.sum()) < 2000
    rounded = plainly_rounded(weight, 32, INT4)
    assert torch.equal(solution.weight()[kept], rounded[kept])


@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("dead", [[], [3, 70]])
def test_a_factor_solves_as_the_dense_hessian_does(group: int, dead: list[int]) -> None:
    inputs = correlated()
    inputs[:, dead] = 0
    hessian = hessian_of(inputs)
    factor = gptq.factorize(hessian, DAMPING, group)
    level = float(hessian.diagonal().mean())
    damped = hessian.double() + DAMPING * level * torch.eye(COLUMNS)
    damped[dead, dead] += level
    rows = drawn(ROWS, COLUMNS, seed=3)
    expected = torch.linalg.solve(damped, rows.double().T).T
    found = factor.solved(rows).double()
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    assert torch.equal(rows, drawn(ROWS, COLUMNS, seed=3))


def test_wide_groups_and_whole_rows_are_solved_panel_by_panel() -> None:
    """Wider than the panel that the compiled loop takes: the textbook's codes all the same."""
    weight, inputs = drawn(ROWS, 320, seed=9) * 0.05, correlated(columns=320)
    hessian = hessian_of(inputs)
    for group in (160, -1):
        factor = gptq.factorize(hessian, DAMPING, group)
        solution = gptq.solve(weight, hessian, factor, group, INT4)
        expected = textbook(weight, hessian, solution.scale, factor.order, INT4.low)
        assert float((solution.codes == expected).all(dim=1).float().mean()) > MOST_ROWS
        assert float(solution.loss.sum()) < 0.5 * float(solution.rounding_loss.sum())


@pytest.mark.parametrize(("levels", "group"), CASES)
def test_scales_are_what_the_checkpoint_stores(levels: Levels, group: int) -> None:
    solution = solved(drawn(ROWS, COLUMNS) * 0.02, hessian_of(correlated()), group, levels)
    assert torch.equal(solution.scale, solution.scale.to(levels.dtype).float())
    assert solution.scale.shape == (ROWS, 1 if group < 0 else COLUMNS // group)
    assert solution.codes.dtype == torch.int8
    assert levels.low <= int(solution.codes.min()) and int(solution.codes.max()) <= levels.high


def test_stacked_layers_get_what_they_get_alone() -> None:
    weight, hessian = drawn(90, COLUMNS), hessian_of(correlated())
    stacked = solved(weight, hessian, 32, INT4)
    for rows in (slice(0, 40), slice(40, 50), slice(50, 90)):
        alone, part = solved(weight[rows], hessian, 32, INT4), stacked.rows(rows)
        assert float((alone.codes == part.codes).float().mean()) > NEARLY_ALL
        torch.testing.assert_close(alone.loss, part.loss, rtol=1e-2, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([32, 64, 128, -1]))
def test_the_order_keeps_groups_whole_and_puts_the_largest_first(seed: int, group: int) -> None:
    diagonal = drawn(COLUMNS, seed=seed).square()
    size = group if group > 0 else COLUMNS
    order = gptq.factorize(torch.diag(diagonal), DAMPING, group).order.view(-1, size)
    assert torch.equal(order.flatten().sort().values, torch.arange(COLUMNS))
    assert all(len(set((part // size).tolist())) == 1 for part in order)
    sorted_inside = diagonal[order]  # [groups, size]
    assert bool((sorted_inside.diff(dim=1) <= 0).all())
    assert bool((sorted_inside[:, 0].diff() <= 0).all())


@pytest.mark.parametrize("group", [32, -1])
def test_another_draw_is_another_order_of_whole_groups(group: int) -> None:
    hessian, rows = hessian_of(correlated()), drawn(ROWS, COLUMNS, seed=3)
    factors = [gptq.factorize(hessian, DAMPING, group, draw) for draw in (0, 1, 2, 1)]
    orders = [tuple(factor.order.tolist()) for factor in factors]
    assert orders[1] == orders[3] and len(set(orders)) == 3
    size = group if group > 0 else COLUMNS
    for factor in factors:
        assert torch.equal(factor.order.sort().values, torch.arange(COLUMNS))
        assert all(len(set((part // size).tolist())) == 1 for part in factor.order.view(-1, size))
        torch.testing.assert_close(factor.solved(rows), factors[0].solved(rows), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("levels", "group"), CASES)
def test_the_better_of_two_orders_is_kept_row_by_row(levels: Levels, group: int) -> None:
    weight, inputs = drawn(ROWS, COLUMNS, seed=9) * 0.05, correlated()
    hessian = hessian_of(inputs)
    first, second = (gptq.factorize(hessian, DAMPING, group, draw) for draw in (0, 1))
    one, other = (gptq.solve(weight, hessian, each, group, levels) for each in (first, second))
    best = gptq.bettered(one, weight, second, levels)
    assert torch.equal(best.loss, torch.minimum(one.loss, other.loss))
    assert 0 < int((best.loss < one.loss).sum()) < ROWS
    found = output_loss(inputs, weight, best.weight())
    torch.testing.assert_close(best.loss.double(), found, rtol=1e-3, atol=0)


def test_a_column_nobody_reads_is_rounded_by_itself() -> None:
    weight, inputs = drawn(ROWS, COLUMNS), correlated()
    inputs[:, [5, 100]] = 0
    hessian = hessian_of(inputs)
    factor = gptq.factorize(hessian, DAMPING, 32)
    solution = gptq.solve(weight, hessian, factor, 32, INT4)
    assert factor.dead == 2
    for column in (5, 100):
        steps = (weight[:, column] / solution.scale[:, column // 32]).round().clamp(-8, 7)
        assert torch.equal(solution.codes[:, column].float(), steps)


def test_damping_grows_until_the_factorization_succeeds() -> None:
    """An eigenvalue of about -1 in units of the mean diagonal: damping below one cannot do."""
    hessian = torch.eye(32)
    hessian[0, 1] = hessian[1, 0] = 2.0
    factor = gptq.factorize(hessian, DAMPING, 32)
    assert factor.damping == DAMPING * 2**7  # 1.28
    backwards = torch.linalg.cholesky_ex(hessian + DAMPING * 2**6 * torch.eye(32))
    assert int(backwards.info) > 0
    assert bool(torch.isfinite(factor.feedback).all())


def test_a_hessian_that_no_damping_saves_is_refused() -> None:
    hessian = torch.eye(32)
    hessian[0, 1] = hessian[1, 0] = 50.0
    with pytest.raises(SolveError, match=r"could not be factorized with damping up to 5\.12"):
        gptq.factorize(hessian, DAMPING, 32)


def test_a_matrix_turned_in_its_place_is_turned() -> None:
    square = drawn(1500, 1500)  # more than is moved at a time
    turned = square.clone()
    gptq._turn(turned)
    assert torch.equal(turned, square.flip(0, 1))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_non_finite_weights_are_an_error(value: float) -> None:
    weight = drawn(8, COLUMNS)
    weight[2, 2] = value
    with pytest.raises(SolveError, match="weights are not finite"):
        solved(weight, hessian_of(correlated()), 32, INT4)


def test_codes_and_scales_multiply_back_group_by_group() -> None:
    codes = torch.tensor([[1, -2, 3, -8], [0, 7, 1, 1]], dtype=torch.int8)
    scale = torch.tensor([[0.5, 2.0], [1.0, 0.25]])
    expected = torch.tensor([[0.5, -1.0, 6.0, -16.0], [0.0, 7.0, 0.25, 0.25]])
    assert torch.equal(gptq.dequantize(codes, scale), expected)
