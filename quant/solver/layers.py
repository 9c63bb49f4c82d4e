"""The linear layers of a model on their way into a checkpoint: solved, held a block, reported.

Knows which grid and which inputs each format means. Refuses to go on past a layer that could not
be solved, and names it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from quant import checkpoint
from quant.artifact import LayerReport
from quant.checkpoint import Layer
from quant.errors import SolveError, SourceError, during
from quant.formats import FULL, Format, Plan, Shapes
from quant.intake.source import Source
from quant.lora.adapter import INPUT_DIVISOR, OUTPUT_DIVISOR
from quant.recipe import Recipe
from quant.solver import descent, gptq, int8, moments, smoothing, weighting
from quant.solver.folds import Feed
from quant.solver.gptq import Solution
from quant.solver.grid import Levels, full_range
from quant.solver.moments import HeldOut, Moments, rounded_factors
from quant.solver.preflight import HELD
from quant.solver.walk import Group

# Of the fit of what a stream lacks: a layer's inputs tell little of it, the rest is noise.
_LACK_DAMPING = 0.1


def levels(form: Format, dtype: torch.dtype) -> Levels:
    """The grid of a quantized format; `dtype` is that of scales where the format leaves it open."""
    return int8.CHANNEL if form.inputs == 8 else full_range(form.bits, dtype)


def half(source: Source) -> torch.dtype:
    """What a model is served in: kernels and scales are 16-bit."""
    return source.dtype if source.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16


class Progress(Protocol):
    """Who is told what happens."""

    def say(self, line: str) -> None: ...

    def solved(self, report: LayerReport, done: int, total: int) -> None: ...


class Layers:
    """`visit` solves and `encoded` gives away; `reports` and `digests` stay, [layers] of each.

    Losses are mean squared errors of a layer's outputs over the calibration tokens it was fitted
    to, evened, against the shifted target's and relative to the outputs' mean square.
    """

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        dtype: torch.dtype,
        shapes: Shapes,
        progress: Progress,
    ) -> None:
        self.plan, self.dtype = plan, dtype
        self.reports: list[LayerReport] = []
        self.digests: dict[str, str] = {}
        self.units: dict[str, Tensor] = {}  # what smoothing divides by, of blocks not yet kept
        self._damping, self._refine = recipe.damping, recipe.refine
        self._shapes, self._progress = shapes, progress
        self.scales_inputs = any(form.inputs == 8 for form in plan.values())
        self._solved: dict[str, Layer] = {}
        self._hashing = ThreadPoolExecutor(1, "digest")  # while the next layers are solved
        self._hashed: dict[str, Future[str]] = {}
        self._smoothed: dict[nn.Linear, Tensor] = {}  # what a layer's inputs are divided by
        self._folded: dict[str, Tensor] = {}  # the parent's tensors that do the dividing

    def __enter__(self) -> Layers:
        return self

    def __exit__(self, *_: object) -> None:
        self._hashing.shutdown()

    def seen(self, linear: nn.Linear, inputs: Tensor) -> Tensor:
        """What a served layer computes with."""
        if linear not in self._smoothed:
            return inputs
        return int8.as_served(inputs / self._smoothed[linear].to(inputs.device))

    def visit(self, group: Group) -> None:
        """Solves the layers of a group and sets their weights, those of one format together."""
        alike: dict[Format, dict[str, nn.Linear]] = {}
        for name, linear in group.linears.items():
            alike.setdefault(self.plan[f"{group.prefix}{name}"], {})[name] = linear
        for form, linears in alike.items():
            with during(f"solving {group.prefix}{' and '.join(linears)}"):
                self._visit(replace(group, linears=linears), form)

    def _visit(self, group: Group, form: Format) -> None:
        names = [f"{group.prefix}{name}" for name in group.linears]
        if form == FULL:
            self._leave(dict(zip(names, group.linears.values(), strict=True)))
            return
        weight = torch.cat([linear.weight.float() for linear in group.linears.values()])
        even = weighting.counted(group.inputs)
        try:
            if form.inputs == 8:
                weight = self._smooth(weight, group, even)
            solution, energy, damping, dead = self._solve(weight, group, even, form)
        except SolveError as fault:
            raise SolveError(f"{' and '.join(names)} could not be solved: {fault}") from fault
        if dead:
            self._progress.say(
                f"{names[0]}: {dead} of {weight.shape[1]} inputs"
                " are zero on every calibration token"
                + ("; rounded to nearest" if dead == weight.shape[1] else "")
            )
        routed = self._routed(names[0], group)
        start = 0
        for name, linear in zip(names, group.linears.values(), strict=True):
            rows = slice(start, start + linear.out_features)
            part = solution.rows(rows)
            self._keep(name, linear, part)
            self._report(name, part, energy[rows], damping, routed)
            start = rows.stop

    def _routed(self, name: str, group: Group) -> int | None:
        """Tokens that the router gave an expert, whose neglect is told; None of other layers."""
        routed = [given.routed for given in group.inputs if given.routed is not None]
        if not routed:
            return None
        count = sum(int(each.sum()) for each in routed)
        if not count:
            self._progress.say(
                f"{name}: no calibration token is routed to it; solved for other experts' tokens"
            )
        return count

    def encoded(self, source: Source, name: str) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a checkpoint that stand for the parent's tensor `name`."""
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or module not in self._solved:
            yield name, self.kept(source, name)
            return
        layer = self._solved.pop(module)
        self.digests[module] = self._hashed.pop(module).result()
        for kind, tensor in checkpoint.encode(self.plan[module], layer, self.dtype).items():
            yield f"{module}.{kind}", tensor

    def kept(self, source: Source, name: str) -> Tensor:
        """The parent's tensor in the dtype it will be served in, a folded scale in it.

        SourceError where a number of it is not finite there.
        """
        folded = self._folded.pop(name, None)
        made = source.tensors.get(name).to(self.dtype) if folded is None else folded
        # The ends of the range tell, without a table of all numbers as isfinite makes one.
        if made.numel() and not all(bool(end.isfinite()) for end in made.aminmax()):
            raise SourceError(
                f"{source.folder}: {name} holds numbers that are not finite in"
                f" {str(self.dtype).removeprefix('torch.')}, which the model is served in"
                + ("; bfloat16 as dtype in config.json holds them" * (self.dtype == torch.float16))
            )
        return made

    def _smooth(self, weight: Tensor, group: Group, even: Sequence[Tensor]) -> Tensor:
        """The weight over inputs whose spread has moved into it, where a layer can take it over."""
        scale = smoothing.chosen(weight, group, even)
        if group.feed is not None:
            scale = self._fold(group, group.feed, scale)
            for name in group.linears:
                self.units[f"{group.prefix}{name}.{INPUT_DIVISOR}"] = scale.cpu()
        for linear in group.linears.values():
            self._smoothed[linear] = scale
        return weight * scale

    def _fold(self, group: Group, feed: Feed, scale: Tensor) -> Tensor:
        """Lets the feeding layer divide by `scale`; by what it divides once that is stored."""
        name = f"{group.prefix}{feed.name}"
        layer = self._solved.get(name)
        if layer is not None:
            self._set(
                name, Layer(layer.codes, feed.scaled(layer.scale, 1 / scale.to(layer.scale.device)))
            )
            divisor = torch.ones(len(layer.codes))
            divisor[feed.first :] = scale.cpu()
            self.units[f"{name}.{OUTPUT_DIVISOR}"] = divisor
            return scale
        if isinstance(feed.layer, nn.Linear):  # solved only later
            return torch.ones_like(scale)
        folded = self._folded[f"{name}.weight"] = feed.folded(scale, self.dtype)
        return feed.divisor(folded.float())

    def _solve(
        self, weight: Tensor, group: Group, even: Sequence[Tensor], form: Format
    ) -> tuple[Solution, Tensor, float, int]:
        """The solution for stacked rows, the mean square of each row's output, the damping that was
        needed, and how many inputs are dead.

        In float32 whatever the forwards are computed in: a loss is a small difference.
        """
        fitted, held = self._moments(weight, group, even)
        if fitted.hessian.is_dead():
            plain = gptq.rounded(weight, form.group, levels(form, self.dtype))
            return plain, plain.loss, 0.0, weight.shape[1]
        pulled, lack = fitted.pull(), fitted.lack()
        matrix = fitted.hessian.mean()
        del fitted  # the drift's moment, before as much is needed to factorize
        target = self._made_up(weight, lack, matrix, held) if len(lack) else weight
        factor = gptq.factorize(matrix, self._damping, form.group)
        target = descent.shifted(weight, target, pulled, held, factor)
        grid, goals = levels(form, self.dtype), descent.few_rows(target)
        found = [gptq.solve(goal, matrix, factor, form.group, grid) for goal in goals]
        damping, dead = factor.damping, factor.dead
        del factor  # before the next one is made
        for draw in range(1, self._refine + 1):
            other = gptq.factorize(matrix, damping, form.group, draw)
            for place, goal in enumerate(goals):
                found[place] = gptq.bettered(found[place], goal, other, grid)
            del other
        improved = [
            descent.improved(goal, start, (matrix, held), grid)
            for goal, start in zip(goals, found, strict=True)
        ]
        with rounded_factors():
            energy = [moments.energy(part, matrix) for part in descent.few_rows(weight)]
        return gptq.stacked(improved), torch.cat(energy), damping, dead

    def _made_up(self, weight: Tensor, lack: Tensor, matrix: Tensor, held: HeldOut) -> Tensor:
        """The target of a layer that adds to a stream, moved by what that lacks."""
        loose = gptq.factorize(matrix, max(self._damping, _LACK_DAMPING), -1)
        return descent.shifted(weight, weight, lack, held, loose)

    def _moments(
        self, weight: Tensor, group: Group, even: Sequence[Tensor]
    ) -> tuple[Moments, HeldOut]:
        """Of the evened inputs that are fitted to, and of those that are held out."""
        linear = next(iter(group.linears.values()))
        fitted: dict[torch.device, Moments] = {}
        gaps, adds = weighting.gaps(group.inputs, even), group.inputs[0].gap is not None
        held = moments.held_out(sum(len(by) // HELD for by in even), weight, adds=adds)
        for given, by, gap in zip(group.inputs, even, gaps, strict=True):
            dtype = given.served.dtype
            by = by.to(dtype)  # one factor a row, the same for all that is read
            served = self.seen(linear, given.served).mul(by).to(dtype)
            parent = self._meant(linear, given.parent).mul(by).to(dtype)
            last = len(served) - len(served) // HELD
            if served.device not in fitted:
                fitted[served.device] = Moments(weight.to(served.device), adds=adds)
            read = [served, parent, *([] if gap is None else [gap.to(dtype)])]
            fitted[served.device].add(*(each[:last] for each in read))
            held.add(*(each[last:].to(weight.device) for each in read))
        return moments.merged(list(fitted.values()), weight.device), held

    def _meant(self, linear: nn.Linear, inputs: Tensor) -> Tensor:
        """The parent's inputs in the units of the served ones."""
        if linear not in self._smoothed:
            return inputs
        return inputs / self._smoothed[linear].to(inputs.device)

    def _leave(self, linears: Mapping[str, nn.Linear]) -> None:
        """Layers that stay in full precision: what follows sees them in the dtype served."""
        for name, linear in linears.items():
            linear.weight.copy_(linear.weight.to(self.dtype))
            self._told(LayerReport(name=name, loss=0, rounding_loss=0, damping=0, bits=FULL.bits))

    def _keep(self, name: str, linear: nn.Linear, solution: Solution) -> None:
        self._set(name, Layer(solution.codes, solution.scale))
        linear.weight.copy_(solution.weight())

    def _set(self, name: str, layer: Layer) -> None:
        self._solved[name] = layer
        self._hashed[name] = self._hashing.submit(layer.digest)

    def _report(
        self, name: str, solution: Solution, energy: Tensor, damping: float, routed: int | None
    ) -> None:
        scale = max(float(energy.sum()), torch.finfo(torch.float32).tiny)
        report = LayerReport(
            name=name,
            loss=float(solution.loss.sum()) / scale,
            rounding_loss=float(solution.rounding_loss.sum()) / scale,
            damping=damping,
            bits=self.plan[name].bits,
            group=self.plan[name].group,
            routed=routed,
        )
        self._told(report)

    def _told(self, report: LayerReport) -> None:
        self.reports.append(report)
        self._progress.solved(report, len(self.reports), len(self._shapes))

    def bytes_after(self, source: Source) -> int:
        """Bytes of the checkpoint's tensors."""
        total = 0
        for name in source.tensors.names():
            shape = source.tensors.shape(name)
            module = name.removesuffix(".weight")
            if module in self._shapes:
                total += self.plan[module].stored(self._shapes[module])
            else:
                total += torch.Size(shape).numel() * self.dtype.itemsize
        return total
