"""The change of a layer, within a rank, that brings its outputs nearest to what they should be.

Tensors in, tensors out. Nearest in the metric of the layer's own inputs, tr(E H E^T): truncated
there, the best fit is U U^T L for the largest eigenvectors U of L H L^T (SVD-LLM, 2403.07378; EoRA,
2410.21271; QERA, 2410.06040), which needs no inverse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant import interrupt
from quant.solver.moments import Hessian

_SPARE, _ROUNDS = 16, 8  # of a subspace iteration: columns beside those wanted, and its length


class Misses:
    """Over calibration tokens: H = mean x x^T of inputs x, and C = mean e x^T of what outputs e
    are missing [rows, columns]."""

    def __init__(self, rows: int, columns: int, device: torch.device | None = None) -> None:
        self._hessian = Hessian(columns, device)
        self._cross = torch.zeros(rows, columns, device=device)

    def add(self, inputs: Tensor, missing: Tensor) -> None:
        """Counts inputs [tokens, columns] and what is missing behind them, [tokens, rows]."""
        self._hessian.add(inputs)
        self._cross.addmm_(missing.T, inputs)

    def hessian(self) -> Tensor:
        return self._hessian.mean()

    def cross(self) -> Tensor:
        return self._cross / max(self._hessian.tokens, 1)


def wanted(start: Tensor, way: Tensor, held: tuple[Tensor, Tensor]) -> Tensor:
    """The change L [rows, columns] for which L x is nearest to what is missing.

    `start` with as much of `way`, from it to C H^-1, as is best on held-out tokens, whose H and C
    are `held`: the rest is noise.
    """
    hessian, cross = held
    along = way @ hessian
    gained = float((cross * way).sum() - (along * start).sum())
    spent = float((along * way).sum())
    strength = min(max(gained / spent, 0.0), 1.0) if spent > 0 else 0.0
    return start + strength * way


def fitted(change: Tensor, hessian: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, columns] and B [rows, rank] whose product is nearest to `change` on such inputs."""
    basis = _largest(change @ hessian @ change.T, min(rank, len(change)))
    return basis.T @ change, basis


def missed(change: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor]) -> float:
    """Mean |e - B A x|^2 of tokens of this H and C, up to what no change can do anything about."""
    (a, b), (hessian, cross) = change, held
    return float(((a @ hessian @ a.T) * (b.T @ b)).sum() - 2 * ((b.T @ cross) * a).sum())


def _largest(square: Tensor, count: int) -> Tensor:
    """Eigenvectors [rows, count] of the largest eigenvalues of a symmetric matrix without negative
    ones, by subspace iteration."""
    draw = torch.Generator().manual_seed(0)
    width = min(count + _SPARE, len(square))
    basis = torch.randn(len(square), width, generator=draw).to(square)
    for _ in range(_ROUNDS):
        interrupt.check()
        basis = torch.linalg.qr(square @ basis)[0]
    inner = basis.T @ square @ basis
    vectors = torch.linalg.eigh((inner + inner.T) / 2)[1]
    found: Tensor = basis @ vectors[:, -count:]
    return found
