"""The linear layers of a model on their way into a checkpoint: solved, held a block, reported.

Knows which grid and which inputs each scheme means. Refuses to go on past a layer that could not
be solved, and names it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from quant import checkpoint, gptq, grid, int8
from quant.artifact import LayerReport
from quant.blocks import Decoder
from quant.checkpoint import Layer
from quant.errors import SolveError
from quant.gptq import Factor, Hessian, Solution
from quant.recipe import Recipe
from quant.source import Source


class Progress(Protocol):
    """Who is told what happens."""

    def say(self, line: str) -> None: ...

    def solved(self, report: LayerReport, done: int, total: int) -> None: ...


class Layers:
    """`visit` solves and `encoded` gives away; `reports` and `digests` stay, [layers] of each.

    Losses are mean squared errors of a layer's outputs over the calibration tokens, relative to
    the outputs' mean square.
    """

    def __init__(
        self,
        recipe: Recipe,
        group: int,
        dtype: torch.dtype,
        shapes: Mapping[str, tuple[int, int]],
        progress: Progress,
    ) -> None:
        self.scheme, self.group, self.dtype = recipe.scheme, group, dtype
        self.reports: list[LayerReport] = []
        self.digests: dict[str, str] = {}
        self._damping, self._shapes, self._progress = recipe.damping, shapes, progress
        self._levels = (
            int8.CHANNEL if self.scheme == "w8a8" else grid.full_range(recipe.bits, dtype)
        )
        self._solved: dict[str, Layer] = {}

    def seen(self, inputs: Tensor) -> Tensor:
        """What a served layer computes with."""
        return int8.as_served(inputs) if self.scheme == "w8a8" else inputs

    def visit(
        self, decoder: Decoder, place: int, names: Sequence[str], inputs: Iterator[Tensor]
    ) -> None:
        """Solves the layers `names` of a block, which share `inputs`, and sets their weights."""
        linears = {name: decoder.linear(place, name) for name in names}
        try:
            weight = torch.cat([linear.weight for linear in linears.values()])
            solution, energy, factor = self._solve(weight, inputs)
        except SolveError as fault:
            shared = " and ".join(f"{decoder.prefix}{place}.{name}" for name in names)
            raise SolveError(f"{shared} could not be solved: {fault}") from fault
        if factor.dead:
            self._progress.say(
                f"{decoder.prefix}{place}.{names[0]}: {factor.dead} of {weight.shape[1]} inputs"
                " are zero on every calibration token"
            )
        start = 0
        for name, linear in linears.items():
            rows = slice(start, start + linear.out_features)
            full, part = f"{decoder.prefix}{place}.{name}", solution.rows(rows)
            self._keep(full, linear, part)
            self._report(full, part, energy[rows], factor.damping)
            start = rows.stop

    def encoded(self, source: Source, name: str) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a checkpoint that stand for the parent's tensor `name`."""
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or module not in self._solved:
            yield name, self.kept(source, name)
            return
        layer = self._solved.pop(module)
        for kind, tensor in checkpoint.encode(self.scheme, layer, self.dtype).items():
            yield f"{module}.{kind}", tensor

    def kept(self, source: Source, name: str) -> Tensor:
        """The parent's tensor in the dtype it will be served in."""
        return source.tensors.get(name).to(self.dtype)

    def _solve(self, weight: Tensor, inputs: Iterator[Tensor]) -> tuple[Solution, Tensor, Factor]:
        """The solution for stacked rows, the mean square of each row's output, the factor."""
        hessian = Hessian(weight.shape[1], weight.device)
        for rows in inputs:
            hessian.add(rows)
        matrix = hessian.mean()
        factor = gptq.factorize(matrix, self._damping, self.group)
        solution = gptq.solve(weight, matrix, factor, self.group, self._levels)
        return solution, (weight @ matrix).mul_(weight).sum(dim=1), factor

    def _keep(self, name: str, linear: nn.Linear, solution: Solution) -> None:
        layer = Layer(solution.codes.cpu(), solution.scale.cpu())
        self._solved[name] = layer
        self.digests[name] = layer.digest()
        linear.weight.copy_(solution.weight())

    def _report(self, name: str, solution: Solution, energy: Tensor, damping: float) -> None:
        scale = max(float(energy.sum()), torch.finfo(torch.float32).tiny)
        report = LayerReport(
            name=name,
            loss=float(solution.loss.sum()) / scale,
            rounding_loss=float(solution.rounding_loss.sum()) / scale,
            damping=damping,
        )
        self.reports.append(report)
        self._progress.solved(report, len(self.reports), len(self._shapes))

    def bytes_after(self, source: Source) -> int:
        """Bytes of the checkpoint's tensors."""
        total = 0
        for name in source.tensors.names():
            shape = source.tensors.shape(name)
            module = name.removesuffix(".weight")
            if module in self._shapes:
                total += checkpoint.layer_bytes(self.scheme, self._shapes[module], self.group)
            else:
                total += torch.Size(shape).numel() * self.dtype.itemsize
        return total
