"""`bench.quality`: each part of the solver is really taken out or added, and really put back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import quality
from quant.recipe import Scheme
from tests import tiny
from tests.test_pipeline import calibration_file, quantize
from tests.test_rivals import row


def digests(home: Path, scheme: Scheme) -> dict[str, tuple[float, ...]]:
    """Each solver's losses, the full one's first and last."""
    parent = tiny.model_folder(home / "parent", layers=1)
    tiny.plant_outliers(parent)
    texts = calibration_file(home)
    names = [n for n in quality.WITHOUT if scheme in quality.SCHEMES.get(n, quality.ALL)]
    found = {}
    for place, name in enumerate([*names, quality.FULL]):
        asked: dict[str, Any] = {"scheme": scheme, "refine": quality.MORE.get(name, 0)}
        with quality.without(name):
            made = quantize(parent, home / str(place), calibration_file=texts, **asked)
        key = "again" if place == len(names) else name
        found[key] = tuple(layer.loss for layer in made.manifest.layers)
    return found


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8"])
def test_every_part_taken_out_or_added_changes_what_is_solved(
    scheme: Scheme, tmp_path: Path
) -> None:
    found = digests(tmp_path, scheme)
    assert found.pop("again") == found[quality.FULL]
    others = [losses for name, losses in found.items() if name != quality.FULL]
    assert len(set(others)) == len(others)
    assert found[quality.FULL] not in others


def test_a_part_is_back_when_a_run_fails() -> None:
    from quant.solver import descent

    before = descent.shifted
    with pytest.raises(RuntimeError), quality.without("no shifted target"):
        assert descent.shifted is not before
        raise RuntimeError
    assert descent.shifted is before


def test_ratios_are_to_the_full_solver_on_the_same_tokens() -> None:
    sets = ("a" * 64, "b" * 64)
    rows = [row("full", kl, calibration=c) for kl, c in zip((0.1, 0.2), sets, strict=True)]
    rows += [row("no descent", kl, calibration=c) for kl, c in zip((0.2, 0.2), sets, strict=True)]
    (line,) = [line for line in quality.tables(rows) if line.startswith("| no descent")]
    assert "| 1.50 (1.00 .. 2.00) |" in line
