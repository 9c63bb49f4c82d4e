"""`solver.lowrank`: the best change within a rank, held against slow references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant.solver import gptq, lowrank
from quant.solver.lowrank import Misses

pytestmark = pytest.mark.arithmetic

ROWS, COLUMNS, TOKENS = 24, 40, 400


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(seed: int = 0) -> Tensor:
    """Correlated, with a few columns much larger than others."""
    mixed = draw(TOKENS, COLUMNS, seed=seed) @ draw(COLUMNS, COLUMNS, seed=9)
    return mixed * torch.logspace(1, -1, COLUMNS)


def misses(rows: Tensor, missing: Tensor) -> Misses:
    found = Misses(missing.shape[1], rows.shape[1])
    found.add(rows[:100], missing[:100])
    found.add(rows[100:], missing[100:])
    return found


def wanted(start: Tensor, fitted: Misses, held: Misses, damping: float) -> Tensor:
    full = gptq.factorize(fitted.hessian(), damping, -1).solved(fitted.cross())
    return lowrank.wanted(start, full - start, (held.hessian(), held.cross()))


@pytest.mark.parametrize("rank", [1, 5, 16, 24])
def test_the_fit_is_the_truncated_svd_in_the_metric_of_the_inputs(rank: int) -> None:
    change, rows = draw(ROWS, COLUMNS, seed=1), inputs()
    hessian = rows.T @ rows / TOKENS
    root = torch.linalg.cholesky(hessian.double())
    u, values, v = torch.linalg.svd(change.double() @ root, full_matrices=False)
    best = (u[:, :rank] * values[:rank]) @ v[:rank] @ torch.linalg.inv(root)
    a, b = lowrank.fitted(change, hessian, rank)
    assert a.shape == (rank, COLUMNS) and b.shape == (ROWS, rank)

    def loss(found: Tensor) -> float:
        return float((rows.double() @ (change.double() - found).T).square().mean())

    nothing = loss(torch.zeros_like(best))
    assert loss((b @ a).double()) <= 1.001 * loss(best) + 1e-6 * nothing
    assert loss(best) < nothing


def test_more_rank_than_rows_is_the_whole_change() -> None:
    change, rows = draw(ROWS, COLUMNS, seed=1), inputs()
    a, b = lowrank.fitted(change, rows.T @ rows / TOKENS, 30)
    assert len(a) == ROWS
    torch.testing.assert_close(b @ a, change, rtol=1e-4, atol=1e-4)


def test_what_is_missing_throughout_is_found() -> None:
    true, start = draw(ROWS, COLUMNS, seed=2), draw(ROWS, COLUMNS, seed=3)
    fitted, held = (misses(x, x @ true.T) for x in (inputs(1), inputs(2)))
    found = wanted(start, fitted, held, 1e-6)
    assert (found - true).norm() < 0.02 * (start - true).norm()


def test_what_held_out_tokens_do_not_confirm_is_left() -> None:
    start, rows, noise = draw(ROWS, COLUMNS, seed=3), inputs(1), 30 * draw(TOKENS, ROWS, seed=4)
    other = inputs(2)
    fitted, held = misses(rows, rows @ start.T + noise), misses(other, other @ start.T)
    # What was fitted asks for half of its norm; float32 sees a step of its last digit as a gain.
    assert (wanted(start, fitted, held, 0.01) - start).norm() <= 1e-6 * start.norm()


def test_the_miss_of_a_change_is_its_mean_square_up_to_a_constant() -> None:
    rows, missing = inputs(), draw(TOKENS, ROWS, seed=5)
    known = misses(rows, missing)

    def direct(a: Tensor, b: Tensor) -> float:
        return float((missing - rows @ a.T @ b.T).square().sum(dim=1).mean())

    pairs = [(draw(3, COLUMNS, seed=s), draw(ROWS, 3, seed=s + 1)) for s in (6, 8)]
    one, other = (lowrank.missed(pair, (known.hessian(), known.cross())) for pair in pairs)
    assert one - other == pytest.approx(direct(*pairs[0]) - direct(*pairs[1]), rel=1e-3)
