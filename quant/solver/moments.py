"""What a layer's inputs come to over calibration tokens: second moments, or the tokens themselves.

Tensors in, tensors out. Refuses, with SolveError, inputs that nothing can be solved for: no tokens,
non-finite numbers, all zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from quant import interrupt
from quant.errors import SolveError

ALL = slice(None)
STRIP = 384  # columns of a symmetric matrix at a time, with only what is right of its diagonal
_GPU_STRIP = 2048  # enough of them to occupy one


class Hessian:
    """H = sum x x^T / tokens over the inputs [tokens, columns] of a layer, in float32.

    One matrix in all: what was summed becomes the mean in its place, once it is asked for.
    """

    def __init__(self, columns: int, device: torch.device | None = None) -> None:
        self._sum = torch.zeros(columns, columns, device=device)
        self._is_mean = False
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Counts every row of `inputs` [tokens, columns]; leave padding out."""
        assert not self._is_mean, "the mean was taken already"
        if inputs.is_cuda or inputs.dtype == torch.float32:
            self._accumulate(inputs)
        else:
            with rounded_factors():
                self._accumulate(inputs.float())
        self.tokens += inputs.shape[0]

    def _accumulate(self, inputs: Tensor) -> None:
        for strip in _strips(inputs):
            right = slice(strip.start, None)
            accumulate(self._sum[strip, right], inputs[:, strip], inputs[:, right])

    def take(self, other: Hessian) -> None:
        """Counts what another one has counted, wherever that lies."""
        assert not (self._is_mean or other._is_mean), "the mean was taken already"
        self._sum += other._sum.to(self.device)
        self.tokens += other.tokens

    @property
    def device(self) -> torch.device:
        return self._sum.device

    def is_zero(self) -> bool:
        """Whether nothing was added, or nothing but zeros."""
        return not bool(self._sum.diagonal().any())

    def is_dead(self) -> bool:
        """Whether tokens were added, and nothing but zeros of each: no weight changes anything."""
        return self.tokens > 0 and self.is_zero()

    def mean(self) -> Tensor:
        """[columns, columns]. SolveError without tokens, or with non-finite or all-zero inputs."""
        if self.tokens == 0:
            raise SolveError("no calibration token reached it")
        whole = self._sum
        if not self._is_mean:
            _mirror(whole.div_(self.tokens))
            self._is_mean = True
        # No product is larger than the larger of its factors' squares.
        if not bool(torch.isfinite(whole.diagonal()).all()):
            raise SolveError("its inputs are not finite")
        if float(whole.diagonal().amax()) == 0:
            raise SolveError("its inputs are all zero")
        return whole


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left^T right, of 16-bit numbers as fast as they can be: in float32, but that a CPU
    rounds the sum of each call to 16 bits, for torch has no such product there with another
    result."""
    if left.dtype == torch.float32:
        total.addmm_(left.T, right)
    elif left.is_cuda:  # as its tensor cores do it
        torch.addmm(total, left.T, right, out_dtype=torch.float32, out=total)
    else:
        total += left.T @ right


@contextmanager
def rounded_factors() -> Iterator[None]:
    """Float32 products whose factors are rounded to bfloat16, at twice the rate, on a CPU that
    multiplies those: for factors that are no longer, and where no small difference is looked for.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def energy(rows: Tensor, hessian: Tensor) -> Tensor:
    """r H r^T of each row r of `rows` [rows, columns], with half of a product: H is symmetric."""
    found = rows.new_zeros(len(rows))
    for strip in _strips(rows):
        along = rows[:, : strip.start] @ hessian[: strip.start, strip]
        along.addmm_(rows[:, strip], hessian[strip, strip], beta=2)
        found += along.mul_(rows[:, strip]).sum(dim=1)
    return found


def _strips(rows: Tensor) -> Iterator[slice]:
    """Of the columns of `rows` [rows, columns]."""
    width = _GPU_STRIP if rows.is_cuda else STRIP
    return (slice(start, start + width) for start in range(0, rows.shape[1], width))


def _mirror(matrix: Tensor) -> None:
    """Below the diagonal what stands above it, without a second matrix."""
    for strip in _strips(matrix):
        square = matrix[strip, strip].triu()
        matrix[strip, strip] = square + square.triu(1).T
        matrix[strip.stop :, strip] = matrix[strip, strip.stop :].T


class Moments:
    """Of a layer's inputs over calibration tokens; `weight` [rows, columns] is the parent's.

    `hessian` [columns, columns] is H = mean x x^T of inputs x as served; the drift [columns,
    columns] is D = mean (p - x) x^T, how the parent's inputs p differ along them; the gap [rows,
    columns] is G = mean g x^T, what a stream that the layer `adds` to lacks along them.
    """

    def __init__(self, weight: Tensor, *, adds: bool = False) -> None:
        rows, width = weight.shape
        self._weight, self.hessian = weight, Hessian(width, weight.device)
        self._few = 2 * rows < width  # then w D is less to sum than D, a product for w in it
        self._drift = weight.new_zeros(rows if self._few else width, width)
        self._gap = weight.new_zeros(rows if adds else 0, width)

    def add(self, served: Tensor, parent: Tensor, gap: Tensor | None = None) -> None:
        """Counts every row of the inputs [tokens, columns] and of the gap [tokens, rows]."""
        interrupt.check()
        self.hessian.add(served)
        drift = parent - served
        if self._few:
            drift = drift @ self._weight.to(drift.dtype).T
        accumulate(self._drift, drift, served)
        if gap is not None:
            accumulate(self._gap, gap, served)

    def take(self, other: Moments) -> None:
        """Counts what another one has counted, wherever that lies."""
        self.hessian.take(other.hessian)
        self._drift += other._drift.to(self._drift.device)
        self._gap += other._gap.to(self._gap.device)

    def is_zero(self) -> bool:
        """Whether nothing was added, or nothing but zeros as served."""
        return self.hessian.is_zero()

    def pull(self, rows: slice = ALL) -> Tensor:
        """w D [rows, columns]: what the drift asks of these `rows` of the layer's outputs."""
        pulled = self._drift[rows] if self._few else self._weight[rows] @ self._drift
        return pulled / max(self.hessian.tokens, 1)

    def lack(self) -> Tensor:
        """G [rows, columns]: what the gap asks of them; no rows where there is no stream."""
        return self._gap / max(self.hessian.tokens, 1)

    def asked(self, rows: slice = ALL) -> Tensor:
        """Both, of these `rows`."""
        found = self.pull(rows)
        if len(self._gap):
            found.add_(self._gap[rows], alpha=1 / max(self.hessian.tokens, 1))
        return found

    def times(self, rows: Tensor) -> Tensor:
        """r H of each of the rows r [rows, columns]."""
        return rows @ self.hessian.mean()

    def gained(self, before: Tensor, after: Tensor) -> Tensor:
        """By how much [rows] the loss e H e^T of each row e of `before` is above `after`'s."""
        return self.times(before - after).mul_(before + after).sum(dim=1)


class Sample:
    """The same of at most so many `tokens`, kept as they are: where they are fewer than columns,
    less to hold and less to multiply."""

    def __init__(self, weight: Tensor, tokens: int, *, adds: bool = False) -> None:
        rows, width = weight.shape
        self._weight, self._count = weight, 0
        self._served, self._drift = (weight.new_zeros(tokens, width) for _ in range(2))
        self._gap = weight.new_zeros(tokens, rows if adds else 0)

    def add(self, served: Tensor, parent: Tensor, gap: Tensor | None = None) -> None:
        here = slice(self._count, self._count + len(served))
        self._served[here], self._drift[here] = served, parent - served
        if gap is not None:
            self._gap[here] = gap
        self._count = here.stop

    def is_zero(self) -> bool:
        return not bool(self._served.any())

    def asked(self, rows: slice = ALL) -> Tensor:
        asked = self._drift @ self._weight[rows].T
        if self._gap.shape[1]:
            asked += self._gap[:, rows]
        return self._over_tokens(asked.T @ self._served)

    def times(self, rows: Tensor) -> Tensor:
        return self._over_tokens((self._served @ rows.T).T @ self._served)

    def gained(self, before: Tensor, after: Tensor) -> Tensor:
        with rounded_factors():
            moved, twice = self._served @ (before - after).T, self._served @ (before + after).T
        return self._over_tokens(moved.mul_(twice).sum(dim=0))

    def _over_tokens(self, total: Tensor) -> Tensor:
        return total.div_(max(self._count, 1))


def merged(parts: Sequence[Moments], device: torch.device) -> Moments:
    """Of the tokens of all parts, on `device`, where at least one has been."""
    whole = next(part for part in parts if part.hessian.device == device)
    for part in parts:
        if part is not whole:
            whole.take(part)
    return whole


HeldOut = Moments | Sample  # of tokens that nothing was fitted to


def held_out(tokens: int, weight: Tensor, *, adds: bool = False) -> HeldOut:
    """Whichever of the two is smaller for so many tokens."""
    if tokens <= weight.shape[1]:
        return Sample(weight, tokens, adds=adds)
    return Moments(weight, adds=adds)
