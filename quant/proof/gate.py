"""The gate of `quantize --max-kl`: what is further from its parent than allowed is not published.

Measures the staged artifact on rows that did not calibrate it. What is refused leaves its report
beside the target, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quant.artifact import Manifest
from quant.errors import SpaceError
from quant.intake.source import Say, Source
from quant.proof import compare, fidelity, held_out, replica
from quant.proof.fidelity import Pair, Sample
from quant.recipe import Recipe
from quant.solver import devices

_ROWS = 16  # of the calibration's length


@dataclass(frozen=True, slots=True)
class Gate:
    """The rows that decide, the mean KL in nats that is allowed, and what it is about."""

    sample: Sample
    limit: float
    target: Path
    say: Say

    def measured(self, name: str, done: int, total: int) -> None:
        if done == total or done == total // 2:
            self.say(f"{name}: {done} of {total} windows measured")

    def admit(self, opened: Source, folder: Path, manifest: Manifest) -> Manifest:
        """The staged artifact's manifest with what was measured; TooLossy where it may not pass."""
        device = devices.first(str(manifest.recipe["device"]))
        self.say(f"measuring {len(self.sample.windows)} rows of {self.sample.name}")
        pair = Pair(
            replica.of_parent(opened, device), replica.of_artifact(opened, folder, manifest, device)
        )
        found, _ = compare.on_text(pair, self.sample, 0, self)
        known = compare.store(folder, manifest, fidelity.now(found), self.target.name)
        report = self.target.with_name(f"{self.target.name}.rejected.json")
        if found.mean_kl.value > self.limit:
            _keep(report, known)
        else:
            report.unlink(missing_ok=True)
        compare.check_limit(found, self.limit, f"{self.target} is not published, {report} says why")
        return known


def rows(opened: Source, recipe: Recipe, file: Path | None, say: Say) -> Sample:
    """Self-written with another seed, or the part of `file` that calibration leaves out."""
    fewer = recipe.model_copy(update={"samples": _ROWS, "assistant_only": False})
    if file is None:
        return held_out.self_written(opened, fewer, recipe.seed, say)
    return held_out.from_lines(opened, file, fewer, say, "held-out")


def _keep(report: Path, manifest: Manifest) -> None:
    try:
        report.write_text(manifest.model_dump_json(indent=1) + "\n", "utf-8")
    except OSError as fault:
        raise SpaceError(f"{report} cannot be written: {fault.strerror}") from fault
