"""What each part of the solver is worth: the same run without it, or with more, on the same tokens.

A part is switched off from here, by putting something plainer in its place in `quant.solver`; the
product has no such switches. Several seeds draw several calibration sets; every row of the table is
held against the full solver on the same set.

    python -m bench.quality --model demo --calibration calib.jsonl --text held-out.txt
    python -m bench.quality ... --scheme w8a8 --seeds 0 1 2 --only full "no smoothing"
    python -m bench.quality --table           # what earlier runs found
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench import dequantized, yardstick
from bench.yardstick import Row, Yardstick
from quant import pipeline
from quant.artifact import LayerReport
from quant.intake import source
from quant.recipe import Recipe
from quant.solver import columns, descent, gptq, grid, int8, residual
from quant.solver.grid import Levels

FULL = "full"
Patch = tuple[ModuleType, str, Callable[..., Any]]  # where, the name there, what stands in for it


class Quiet:
    """Nobody watches a table being made."""

    def say(self, line: str) -> None: ...

    def foreseen(self, line: str, _facts: Mapping[str, float]) -> None: ...

    def solved(self, report: LayerReport, done: int, total: int) -> None: ...


def main() -> None:
    args = _arguments()
    if not args.table:
        yardstick.patiently("quality")
        torch.set_num_threads(args.threads)
        _run(args)
    for line in tables(yardstick.kept(args.results)):
        print(line)


def _arguments() -> argparse.Namespace:
    parser = yardstick.parser(__doc__, ALL, "quality")
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the lines that are drawn")
    add("--only", nargs="+", choices=list(WITHOUT), help="these [all that the scheme has]")
    return yardstick.arguments(parser)


def _run(args: argparse.Namespace) -> None:
    windows = Recipe(samples=args.windows, length=args.length)
    measure = Yardstick(source.open(args.model), args.text, windows, args.calibration, *args.apart)
    for seed in args.seeds:
        for name in args.only or [n for n in WITHOUT if args.scheme in SCHEMES.get(n, ALL)]:
            yardstick.say(f"{name}: {args.model}, {args.scheme}, seed {seed}")
            yardstick.keep(args.results, _row(args, name, seed, measure))


def _row(args: argparse.Namespace, name: str, seed: int, measure: Yardstick) -> Row:
    group = None if args.scheme == "w8a8" else args.group_size
    recipe = Recipe(
        scheme=args.scheme, group_size=group, samples=args.samples, length=args.length, seed=seed,
        refine=MORE.get(name, 0),
    )  # fmt: skip
    # A run that was cut short goes on in the folder of its own: never in one of other solvers'.
    out = args.cache / "made" / f"{Path(args.model).name}-{args.scheme}-{seed}-{name}"
    out.parent.mkdir(parents=True, exist_ok=True)
    order = pipeline.Order(args.model, out, calibration_file=args.calibration, force=True)
    with without(name):
        manifest = pipeline.run(recipe, order, Quiet())
    row = Row(
        name=name,
        version="",
        model=Path(args.model).name,
        scheme=args.scheme,
        group_size=manifest.group_size,
        seed=seed,
        calibration=manifest.calibration.digest,
        threads=args.threads,
        cpus="",
        when=datetime.now(UTC),
        seconds=manifest.seconds,
        bytes=dequantized.size(out),
        found=measure.artifact(out),
    )
    shutil.rmtree(out)
    return row


@contextmanager
def without(name: str) -> Iterator[None]:
    """The solver without that part of it, for as long as the block lasts."""
    with ExitStack() as undo:
        for module, attribute, stand_in in WITHOUT[name]:
            undo.callback(setattr, module, attribute, getattr(module, attribute))
            setattr(module, attribute, stand_in)
        yield


def _no_evening(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.ones(len(rows), 1, device=rows.device) for rows in inputs]


def _stored_order(diagonal: Tensor, _group: int) -> Tensor:
    return torch.arange(diagonal.numel(), device=diagonal.device)


def _just_fits(weights: Tensor, levels: Levels) -> Tensor:
    return levels.stored(grid.largest_fits(weights, levels))[:, None]


_offered, _quantize = grid.offered, columns.quantize


def _one_sign(weights: Tensor, levels: Levels) -> Tensor:
    scales = _offered(weights, levels)
    return scales[:, (scales > 0).all(dim=0)]


def _by_rounding(
    weights: tuple[Tensor, Tensor], feedback: Tensor, cost: Tensor, scales: Tensor, levels: Levels
) -> columns.Four:
    chosen = columns.best_rounding(weights[1], cost, scales, levels)[:, None]
    return _quantize(weights, feedback, cost, chosen, levels)


_NO_TARGET: Patch = (descent, "shifted", lambda _weight, target, *_: target)
_NO_GAP: Patch = (residual, "adders", lambda *_: [])
_NO_EVENING: Patch = (descent, "evening", _no_evening)
_NO_DESCENT: Patch = (descent, "improved", lambda _target, start, *_: start)
_BY_ROUNDING: Patch = (columns, "quantize", _by_rounding)
_ONE_SIGN: Patch = (grid, "offered", _one_sign)
_JUST_FITS: Patch = (grid, "offered", _just_fits)
_STORED_ORDER: Patch = (gptq, "_order", _stored_order)
_NO_SMOOTHING: Patch = (int8, "smoothing", lambda weight, *_: torch.ones_like(weight[0]))

WITHOUT: Mapping[str, tuple[Patch, ...]] = {
    FULL: (),
    "no shifted target": (_NO_TARGET,),
    "a target for inputs alone": (_NO_GAP,),
    "no evening": (_NO_EVENING,),
    "no descent": (_NO_DESCENT,),
    "scales chosen by rounding": (_BY_ROUNDING,),
    "scales of one sign": (_ONE_SIGN,),
    "scales that just fit": (_JUST_FITS,),
    "columns as stored": (_STORED_ORDER,),
    "no smoothing": (_NO_SMOOTHING,),
    "plain GPTQ": (_NO_TARGET, _NO_EVENING, _NO_DESCENT, _JUST_FITS, _STORED_ORDER, _NO_SMOOTHING),
    "--refine 4": (),
    "--refine 16": (),
}
MORE = {"--refine 4": 4, "--refine 16": 16}  # orders of columns, where a part is added
ALL = ("w4a16", "w8a16", "w8a8")
# What a scheme does not have cannot be taken from it.
SCHEMES: Mapping[str, tuple[str, ...]] = {
    "scales chosen by rounding": ("w4a16", "w8a16"),
    "scales of one sign": ("w4a16",),
    "no smoothing": ("w8a8",),
}


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """For each model and scheme, a line per part: over seeds, with the ratio to the full solver."""
    settings = dict.fromkeys((row.model, row.scheme, row.group_size) for row in rows)
    for model, scheme, group in settings:
        alike = [row for row in rows if (row.model, row.scheme, row.group_size) ==
                 (model, scheme, group)]  # fmt: skip
        full = {row.calibration: _kl(row) for row in alike if row.name == FULL}
        yield f"\n{alike[0].model}, {alike[0].scheme}, {_group(group)}\n"
        told = "sets | mean KL, nats | 95% of one set | KL / full | perplexity | seconds"
        yield f"| solver | {told} |"
        yield "|---|---|---|---|---|---|---|"
        for name in dict.fromkeys(row.name for row in alike):
            yield _line(name, [row for row in alike if row.name == name], full)


def _line(name: str, rows: Sequence[Row], full: Mapping[str, float]) -> str:
    found = [row.found for row in rows if row.found]
    kls, rises = [_kl(row) for row in rows], [f.perplexity_ratio.value - 1 for f in found]
    ratios = [_kl(row) / full[row.calibration] for row in rows if row.calibration in full]
    first = found[0].mean_kl
    return (
        f"| {name} | {len(rows)} | {_over(kls, '.4f')} | {first.low:.4f} .. {first.high:.4f} | "
        f"{_over(ratios, '.2f')} | {_over(rises, '+.2%')} | "
        f"{_over([row.seconds for row in rows if row.seconds], '.0f')} |"
    )


def _kl(row: Row) -> float:
    assert row.found is not None
    return row.found.mean_kl.value


def _over(values: Sequence[float], form: str) -> str:
    """The mean, and the range where there is more than one."""
    if not values:
        return ""
    shown = f"{statistics.mean(values):{form}}"
    return shown if len(values) == 1 else f"{shown} ({min(values):{form}} .. {max(values):{form}})"


def _group(size: int) -> str:
    return "per channel" if size < 0 else f"groups of {size}"


if __name__ == "__main__":
    main()
