"""Mixed formats beside one format for all, at the same size: bits per weight against KL.

    python -m bench.budget --model demo --calibration calib.jsonl --text held-out.txt --bits 4.5

Quantizes the model uniformly in every 4-bit group size that fits it and within each of `--bits`,
measures all of them on the same windows, and prints each mixed artifact's KL beside that of the
line between its uniform neighbours. Artifacts are left in the cache.
"""

from __future__ import annotations

import argparse
import itertools
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import yardstick
from bench.quality import Quiet
from bench.yardstick import Yardstick
from quant import pipeline, recipe
from quant.errors import RecipeError
from quant.intake import source
from quant.proof.evidence import TextFidelity
from quant.recipe import Recipe

GROUPS = (128, 64, 32)


@dataclass(frozen=True, slots=True)
class Point:
    """One artifact: bits per weight, seconds that it took, and what was lost."""

    name: str
    bits: float
    seconds: float
    found: TextFidelity

    @property
    def kl(self) -> float:
        return self.found.mean_kl.value


def main() -> None:
    args = _arguments()
    yardstick.patiently("budget")
    torch.set_num_threads(args.threads)
    windows = Recipe(samples=args.windows, length=args.length)
    measure = Yardstick(source.open(args.model), args.text, windows, args.calibration, *args.apart)
    named: dict[str, dict[str, object]] = {f"g{size}": {"group_size": size} for size in GROUPS}
    named |= {f"mixed-{bits:g}": {"bits_per_weight": bits} for bits in args.bits}
    points = [
        point
        for name, fields in named.items()
        if (point := _point(args, name, fields, measure)) is not None
    ]
    _table(points)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="demo", help="the full-precision parent, or `demo`")
    add("--calibration", type=Path, required=True, help='JSONL of {"text"} or {"messages"} lines')
    add("--text", type=Path, required=True, help="UTF-8 text to measure on")
    add("--apart", type=Path, nargs="+", default=[], help="further lines that it shall not share")
    add("--bits", type=float, nargs="+", default=[4.5], help="per weight")
    add("--samples", type=int, default=32, help="calibration rows")
    add("--length", type=int, default=512, help="tokens of each, and of each window")
    add("--windows", type=int, default=32, help="windows of the text")
    add("--threads", type=int, default=os.cpu_count() or 1)
    add("--cache", type=Path, default=Path("~/.cache/quantserve/budget"), help="artifacts")
    args = parser.parse_args()
    args.cache = args.cache.expanduser().absolute()
    return args


def _point(
    args: argparse.Namespace, name: str, fields: dict[str, object], measure: Yardstick
) -> Point | None:
    """None of formats that the model's layers cannot have."""
    yardstick.say(name)
    target: Path = args.cache / f"{Path(args.model).name}-{name}"
    target.parent.mkdir(parents=True, exist_ok=True)
    plan = recipe.build({"samples": args.samples, "length": args.length, **fields})
    order = pipeline.Order(args.model, target, calibration_file=args.calibration, force=True)
    try:
        manifest = pipeline.run(plan, order, Quiet())
    except RecipeError as fault:
        yardstick.say(f"{name} is left out: {fault}")
        return None
    assert manifest.bits_per_weight is not None
    return Point(name, manifest.bits_per_weight, manifest.seconds, measure.artifact(target))


def _table(points: list[Point]) -> None:
    uniform = sorted((p for p in points if p.name.startswith("g")), key=lambda p: p.bits)
    head = ("artifact", "bits per weight", "time", "mean KL, nats", "perplexity",
            "KL of the line", "ratio")  # fmt: skip
    print(f"| {' | '.join(head)} |", "|---" * len(head) + "|", sep="\n")
    for point in sorted(points, key=lambda p: p.bits):
        line = None if point in uniform else _line(uniform, point.bits)
        kl, worse = point.found.mean_kl, point.found.perplexity_ratio.value - 1
        cells = [point.name, f"{point.bits:.3f}", f"{point.seconds:.0f} s"]
        cells += [f"{kl.value:.4f} ({kl.low:.4f} .. {kl.high:.4f})", f"{worse:+.2%}"]
        cells += [f"{line:.4f}", f"{point.kl / line:.2f}"] if line else ["", ""]
        print(f"| {' | '.join(cells)} |")


def _line(uniform: list[Point], bits: float) -> float | None:
    """KL between the uniform neighbours, None beyond them."""
    for left, right in itertools.pairwise(uniform):
        if left.bits <= bits <= right.bits:
            part = (bits - left.bits) / (right.bits - left.bits)
            return left.kl + part * (right.kl - left.kl)
    return None


if __name__ == "__main__":
    main()
