"""Mixed formats beside one format for all, at the same size: bits per weight against KL.

    python -m bench.budget demo --calibration texts.jsonl --text held-out.txt --bits 4.5

Quantizes the model uniformly in every 4-bit group size that fits it and within each of `--bits`,
measures all of them on the same windows, and prints each mixed artifact's KL beside that of the
line between its uniform neighbours. Artifacts are kept in `--folder` and not made twice.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quant import artifact, pipeline, recipe
from quant.artifact import LayerReport, Manifest
from quant.errors import RecipeError
from quant.proof import compare

GROUPS = (128, 64, 32)


@dataclass(frozen=True, slots=True)
class Point:
    """One artifact: bits per weight, mean KL in nats with its 95% interval, perplexity."""

    name: str
    bits: float
    kl: float
    low: float
    high: float
    perplexity: float


class Said:
    """Lines alone."""

    def say(self, line: str) -> None:
        print(f"  {line}", flush=True)

    def foreseen(self, line: str, _facts: Mapping[str, float]) -> None:
        self.say(line)

    def solved(self, report: LayerReport, done: int, total: int) -> None:
        if done % 50 == 0 or done == total:
            self.say(f"{done} of {total} layers, {report.name} loss {report.loss:.2e}")

    def measured(self, name: str, done: int, total: int) -> None:
        if done % 8 == 0:
            self.say(f"{name}: {done} of {total} windows")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bits", type=float, nargs="+", default=[4.5])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--folder", type=Path, default=Path(".demo/budget"))
    asked = parser.parse_args()
    named: dict[str, dict[str, object]] = {f"g{size}": {"group_size": size} for size in GROUPS}
    named |= {f"mixed-{bits:g}": {"bits_per_weight": bits} for bits in asked.bits}
    points = []
    for name, fields in named.items():
        print(name, flush=True)
        if (point := _point(asked, name, fields)) is not None:
            points.append(point)
    _table(points)


def _point(asked: argparse.Namespace, name: str, fields: dict[str, object]) -> Point | None:
    target: Path = asked.folder / name
    if not target.exists():
        plan = recipe.build({"samples": asked.samples, "length": asked.length, **fields})
        order = pipeline.Order(asked.model, target, calibration_file=asked.calibration)
        try:
            pipeline.run(plan, order, Said())
        except RecipeError as fault:
            print(f"  left out: {fault}")
            return None
    manifest = artifact.read(target)
    assert manifest is not None and manifest.bits_per_weight is not None
    if manifest.fidelity is None:
        beside = compare.Order(asked.model, target, text=asked.text)
        manifest = compare.run(recipe.draw({}), beside, Said()).manifest
    return _of(name, manifest)


def _of(name: str, manifest: Manifest) -> Point:
    assert manifest.fidelity is not None and manifest.fidelity.text is not None
    found, bits = manifest.fidelity.text, manifest.bits_per_weight or 0.0
    kl = found.mean_kl
    return Point(name, bits, kl.value, kl.low, kl.high, found.perplexity.value)


def _table(points: list[Point]) -> None:
    uniform = sorted((p for p in points if p.name.startswith("g")), key=lambda p: p.bits)
    print("| artifact | bits per weight | mean KL, nats | 95% interval | perplexity"
          " | KL of the line | ratio |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    for point in sorted(points, key=lambda p: p.bits):
        line = None if point in uniform else _line(uniform, point.bits)
        beside = f"{line:.4f} | {point.kl / line:.3f}" if line else " | "
        print(f"| {point.name} | {point.bits:.3f} | {point.kl:.4f} | {point.low:.4f} .."
              f" {point.high:.4f} | {point.perplexity:.2f} | {beside} |")  # fmt: skip


def _line(uniform: list[Point], bits: float) -> float | None:
    """KL between the uniform neighbours, None beyond them."""
    for left, right in itertools.pairwise(uniform):
        if left.bits <= bits <= right.bits:
            part = (bits - left.bits) / (right.bits - left.bits)
            return left.kl + part * (right.kl - left.kl)
    return None


if __name__ == "__main__":
    main()
