"""`bench.rivals` and its ledger: what a run takes is measured, what fails says why."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from bench import rivals, tools, yardstick
from bench.yardstick import Row
from quant import calibration
from quant.intake import source
from quant.proof.evidence import Estimate, TextFidelity
from quant.recipe import Recipe
from quant.solver import grid, int8
from tests import tiny
from tests.test_pipeline import calibration_file


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tools.Asked:
    home = tmp_path_factory.mktemp("rivals")
    opened = source.open(str(tiny.model_folder(home / "parent")), cache=home / "cache")
    recipe = Recipe(samples=2, length=32, group_size=32)
    file = calibration_file(home)
    rows = calibration.prepare(opened, recipe, file, source.quiet)
    return tools.Asked(opened, "w4a16", 32, rows, recipe, file, 1, 60.0, home / "cache")


def run(asked: tools.Asked, program: str) -> tools.Cost:
    return tools.watched([sys.executable, "-c", program], asked, "run", {})


def test_the_memory_of_children_counts(asked: tools.Asked) -> None:
    hold = "import time; b = bytearray(150_000_000); time.sleep(1.5)"
    alone = run(asked, "import time; time.sleep(1)")
    below = run(asked, f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])")
    assert alone.peak_bytes < 100_000_000
    assert below.peak_bytes > 150_000_000
    assert below.seconds > 1.5


def test_a_run_that_fails_says_its_last_word(asked: tools.Asked) -> None:
    with pytest.raises(tools.Failed, match="ValueError: two workers are needed"):
        run(asked, "raise ValueError('two workers are needed')")


def test_a_run_over_its_time_is_ended_with_its_children(asked: tools.Asked) -> None:
    mark = asked.cache / "late"
    late = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {late!r}])"
    with pytest.raises(tools.Failed, match="stopped after 1 s"):
        run(replace(asked, limit=1.0), program)
    time.sleep(3)
    assert not mark.exists()


def test_rounding_keeps_each_weight_within_half_a_step() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 64)
    for levels, group in ((int8.CHANNEL, -1), (grid.full_range(4, torch.float32), 32)):
        layer = rivals.nearest(weight, group, levels)
        step = layer.scale.repeat_interleave(64 // layer.scale.shape[1], dim=1)
        off = (layer.weight() - weight).abs() / step
        inside = layer.codes < levels.high  # the largest may be cut off by one step of the range
        assert float(off[inside].max()) <= 0.5 + 1e-4
        assert float(off.max()) <= 1


def test_cpus_are_read_as_taskset_reads_them() -> None:
    assert rivals.cpus("0,2-4") == {0, 2, 3, 4}


def row(name: str, kl: float | None, **changes: object) -> Row:
    found = None
    if kl is not None:
        same = Estimate(value=kl, low=kl, high=kl)
        figures = dict.fromkeys(
            ("parent_perplexity", "perplexity", "perplexity_ratio", "mean_kl", "p99_kl",
             "top1_agreement", "mean_shift", "rms_shift"), same)  # fmt: skip
        found = TextFidelity(name="t", digest="0" * 64, windows=1, predictions=1, **figures)
    facts = {
        "name": name, "version": "1", "model": "m", "scheme": "w4a16", "group_size": 64,
        "seed": 0, "calibration": "c" * 64, "threads": 1, "cpus": "0", "when": datetime.now(UTC),
        "found": found,
    }  # fmt: skip
    return Row.model_validate(facts | changes)


def test_the_ledger_keeps_the_latest_of_what_was_run_again(tmp_path: Path) -> None:
    ledger = tmp_path / "deep" / "results.jsonl"
    for each in (row("ours", 0.5), row("other", 0.2), row("ours", 0.1), row("ours", 3, seed=1)):
        yardstick.keep(ledger, each)
    kept = yardstick.kept(ledger)
    assert [(r.name, r.found.mean_kl.value) for r in kept if r.found] == [
        ("ours", 3.0),
        ("other", 0.2),
    ]


def test_the_table_holds_everybody_against_ours() -> None:
    rows = [row("other", 0.2), row("ours", 0.1), row("broken", None, failure="no workers")]
    lines = list(yardstick.tables([*rows, row("other", 7, scheme="w8a8")], "ours"))
    (other,) = [line for line in lines if line.startswith("| other") and "0.2000" in line]
    assert "| 2.00 |" in other
    (broken,) = [line for line in lines if line.startswith("| broken")]
    assert "failed: no workers" in broken
    assert sum(line.startswith("| run") for line in lines) == 2
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_what_was_made_is_not_made_again_unless_asked(asked: tools.Asked) -> None:
    out = asked.out("ours")
    out.parent.mkdir(parents=True, exist_ok=True)
    program = f"open({str(out) + '.runs'!r}, 'a').write('x')"
    command = [sys.executable, "-c", program]
    first = tools.made(out, command, asked, {})
    assert tools.made(out, command, asked, {}) == first
    assert tools.made(out, command, replace(asked, again=True), {}) != first
    assert Path(f"{out}.runs").read_text() == "xx"
    assert len({asked.out(name) for name in tools.RIVALS}) == len(tools.RIVALS)
