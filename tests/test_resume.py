"""`quantize` is killed at one moment after the other; the same command makes the same files.

Each run is a process of its own that dies, or finds the disk full, at a chosen step on a file of
the target's hidden sibling.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quant import artifact, checkpoint, journal, shards
from quant.artifact import Manifest
from quant.errors import SolveError
from quant.proof import card
from quant.solver import gptq
from quant.solver.gptq import Solution
from tests import tiny, warm
from tests.dying import die_at, die_at_step, die_writing, fill_disk, note_steps
from tests.test_pipeline import calibration_file
from tests.test_quant_cli import Ran

BLOCKS = 3
SCHEME = ("--scheme", "w8a8")  # it folds scales into norms: more state than the others


def part(place: int, count: int = BLOCKS + 1) -> str:
    """What is outside the blocks is the first, then come the blocks."""
    return f"model-{place:05}-of-{count:05}.safetensors"


# Where a run dies: the first file system step with this event whose path ends like that.
MOMENTS = {
    "before its rows are kept": ("os.rename", ".rows.safetensors.growing"),
    "before its journal begins": ("os.rename", ".journal.json.growing"),
    "while it reads the outside": ("os.rename", f".{part(1)}.growing"),
    "as the first block is written": ("open", f".{part(2)}.growing"),
    "before the block has its name": ("os.rename", f".{part(3)}.growing"),
    "between block and activations": ("open", ".activations-00002.safetensors.growing"),
    "between activations and journal": ("os.remove", "activations-00001.safetensors"),
    "at the end of the last block": ("os.rename", f".{part(4)}.growing"),
    "before parts are joined": ("open", "artifact/.model.safetensors.growing"),
    "when parts are joined": ("os.remove", part(1)),
    "before config.json": ("open", "artifact/config.json"),
    "before the seal": ("os.rename", "artifact/.quantserve.json.partial"),
    "before the target appears": ("os.rename", "artifact"),
}
# Where every part stays the file that it was written as; what is outside the blocks are three.
SPLIT = {
    "while it reads the outside": ("os.rename", f".{part(2, 6)}.growing"),
    "before the block has its name": ("os.rename", f".{part(5, 6)}.growing"),
    "between activations and journal": ("os.remove", "activations-00001.safetensors"),
    "before the index": ("os.rename", ".model.safetensors.index.json.growing"),
    "before the target appears": ("os.rename", "artifact"),
}


def both(*steps: Callable[[], None] | None) -> None:
    for step in steps:
        if step is not None:
            step()


def split() -> None:
    """As if the model were large."""
    shards.JOINED_BYTES, journal._TOGETHER = 0, 1


@dataclass(frozen=True)
class Bench:
    """What all runs read, and the target of each by its name."""

    home: Path
    before: Callable[[], None] | None = None  # in every run's process

    def words(self, name: str, *more: str) -> tuple[str, ...]:
        sizes = ("--samples", "8", "--length", "32", "--cache", str(self.home / "cache"))
        texts = ("--calibration", str(self.home / "texts.jsonl"))
        where = ("quantize", str(self.home / "parent"), "--out", str(self.target(name)))
        return (*where, *sizes, *texts, *SCHEME, "--json", *more)

    def target(self, name: str) -> Path:
        return self.home / name / "out"

    def ran(self, name: str, *more: str, first: Callable[[], None] | None = None) -> Ran:
        said = self.home / name / f"said-{len(list((self.home / name).glob('said-*')))}"
        run = warm.begin(
            *self.words(name, *more), said=said, first=partial(both, self.before, first)
        )
        return Ran(run.status(), run.stdout, run.stderr)

    def kept(self, name: str) -> Path:
        return self.target(name).with_name(".out.partial")


def facts(folder: Path) -> Manifest:
    """The manifest without what differs from run to run."""
    manifest = artifact.read(folder)
    assert manifest is not None
    artifact.verify(folder, manifest)
    files = {name: digest for name, digest in manifest.files.items() if name != card.NAME}
    varying = {"created": None, "seconds": 0.0, "files": files}
    return manifest.model_copy(update=varying)


def same(one: Path, other: Path) -> bool:
    """Every file byte for byte; the manifest but for its times, the card but for its date."""
    left, right = ({p.name: p.read_bytes() for p in f.iterdir()} for f in (one, other))
    for named in (artifact.MANIFEST, card.NAME):
        del left[named], right[named]
    return left == right and facts(one) == facts(other)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    home = tmp_path_factory.mktemp("resume")
    parent = tiny.model_folder(home / "parent", layers=BLOCKS)
    tiny.plant_outliers(parent)
    calibration_file(home)
    return Bench(home)


@pytest.fixture(scope="module")
def whole(bench: Bench) -> Path:
    """What a run makes that nobody disturbs; its steps lie beside it."""
    (bench.home / "whole").mkdir()
    note = partial(note_steps, bench.kept("whole"), bench.home / "whole" / "steps")
    assert bench.ran("whole", first=note).status == 0
    return bench.target("whole")


def cut_short(bench: Bench, name: str, first: Callable[[], None]) -> Ran:
    (bench.home / name).mkdir()
    run = bench.ran(name, first=first)
    assert run.status != 0 and not bench.target(name).exists()
    return run


def done(run: Ran) -> int:
    """Blocks that a run found done."""
    said = [line for line in run.stdout.splitlines() if "which an earlier run finished" in line]
    return int(said[0].split("behind block ")[1].split()[0]) if said else 0


def gone_on(bench: Bench, whole: Path, name: str) -> Ran:
    """The same command once more: it succeeds with the same files, and leaves nothing beside."""
    run = bench.ran(name)
    assert run.status == 0, run.stderr
    assert same(bench.target(name), whole)
    assert not bench.kept(name).exists()
    return run


def test_two_runs_make_the_same_files(bench: Bench, whole: Path) -> None:
    (bench.home / "again").mkdir()
    assert done(gone_on(bench, whole, "again")) == 0


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_is_gone_on_with(moment: str, bench: Bench, whole: Path) -> None:
    run = cut_short(bench, moment, partial(die_at, bench.kept(moment), MOMENTS[moment]))
    assert run.status == -signal.SIGKILL, run.stderr
    solved = run.stdout.count('"event": "layer"')
    after = gone_on(bench, whole, moment)
    finished = sum(run.stdout.count(f'"name": "model.layers.{n}.mlp.down_proj"') for n in range(3))
    assert done(after) in (finished, finished - 1), "a finished block was solved again"
    assert solved + after.stdout.count('"event": "layer"') <= 7 * (BLOCKS + 1)


@pytest.fixture(scope="module")
def apart(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    home = tmp_path_factory.mktemp("split")
    for name in ("parent", "texts.jsonl"):
        (home / name).symlink_to(bench.home / name)
    return Bench(home, split)


@pytest.fixture(scope="module")
def in_parts(apart: Bench) -> Path:
    (apart.home / "whole").mkdir()
    assert apart.ran("whole").status == 0
    return apart.target("whole")


def test_parts_hold_what_one_file_holds(in_parts: Path, whole: Path) -> None:
    names = {part(place, 6) for place in range(1, 7)} | {artifact.INDEX}
    one = {path.name for path in whole.iterdir()} - {artifact.SINGLE}
    assert {path.name for path in in_parts.iterdir()} == one | names
    assert artifact.weights_fingerprint(in_parts) == artifact.weights_fingerprint(whole)
    layers = dict(checkpoint.dequantized(in_parts))
    loaded = AutoModelForCausalLM.from_pretrained(in_parts.parents[1] / "parent")
    assert set(loaded.state_dict()) == set(layers)
    assert facts(in_parts).bytes_after == facts(whole).bytes_after


@pytest.mark.parametrize("moment", SPLIT)
def test_a_run_that_writes_parts_is_gone_on_with(moment: str, apart: Bench, in_parts: Path) -> None:
    run = cut_short(apart, moment, partial(die_at, apart.kept(moment), SPLIT[moment]))
    assert run.status == -signal.SIGKILL, run.stderr
    expected = {"while it reads the outside": 0, "before the block has its name": 1,
                "between activations and journal": 2}  # fmt: skip
    assert done(gone_on(apart, in_parts, moment)) == expected.get(moment, 3)


@pytest.mark.parametrize("number", sorted(random.Random(7).sample(range(1, 80), 5)))
def test_a_run_killed_at_any_step_is_gone_on_with(number: int, bench: Bench, whole: Path) -> None:
    steps = (whole.parent / "steps").read_text().splitlines()
    assert len(steps) > 80
    name = f"step-{number}"
    cut_short(bench, name, partial(die_at_step, bench.kept(name), number * len(steps) // 80))
    gone_on(bench, whole, name)


def test_a_run_killed_over_and_over_comes_to_its_end(bench: Bench, whole: Path) -> None:
    (bench.home / "often").mkdir()
    draw = random.Random(3)
    for place in range(4):
        said = bench.home / "often" / f"killed-{place}"
        run = warm.begin(*bench.words("often"), said=said)
        time.sleep(draw.uniform(0.3, 1.5))
        run.process.kill()
        run.process.join()
        if bench.target("often").exists():
            shutil.rmtree(bench.target("often"))
    gone_on(bench, whole, "often")


@pytest.mark.parametrize(
    "file",
    ["model-00003-of-00004.safetensors", "activations-00001.safetensors", "model.safetensors"],
)
def test_a_run_killed_in_the_middle_of_a_write_is_gone_on_with(
    file: str, bench: Bench, whole: Path
) -> None:
    name = f"middle-of-{file}"
    first = partial(die_writing, bench.kept(name), f".{file}.growing", 20_000)
    assert cut_short(bench, name, first).status == -signal.SIGXFSZ
    halves = list(bench.kept(name).rglob("*.growing"))
    assert [half.stat().st_size for half in halves] == [20_000]
    gone_on(bench, whole, name)


@pytest.mark.parametrize(
    ("file", "promise"),
    [
        ("model-00004-of-00004.safetensors", "continues at block 3 of 3 when run again"),
        ("model.safetensors", "continues behind the last block when run again"),
    ],
)
def test_a_full_disk_midway_is_one_line_and_resumable(
    file: str, promise: str, bench: Bench, whole: Path
) -> None:
    name = f"full-{file}"
    first = partial(fill_disk, bench.kept(name), f".{file}.growing", 20_000)
    run = cut_short(bench, name, first)
    assert run.status == 2 and run.stderr.count("\n") == 1
    assert f"cannot hold {file}: File too large; {promise}" in run.stderr
    assert not list(bench.kept(name).rglob("*.growing"))
    assert done(gone_on(bench, whole, name)) == (2 if "of" in file else 3)


def keep_seldom(folder: Path) -> None:
    """As if states took long to write; it dies in the last block."""
    journal._AT_ONCE, journal._WORTH = -1.0, 10**9
    die_at(folder, MOMENTS["at the end of the last block"])


def test_blocks_faster_than_their_states_are_written_are_not_kept_one_by_one(
    bench: Bench, whole: Path
) -> None:
    run = cut_short(bench, "seldom", partial(keep_seldom, bench.kept("seldom")))
    assert run.status == -signal.SIGKILL
    assert (bench.kept("seldom") / "state" / part(3)).exists()
    assert done(gone_on(bench, whole, "seldom")) == 1  # what came after it is done again


def killed(bench: Bench, name: str) -> None:
    """A run that has done one block."""
    moment = MOMENTS["before the block has its name"]
    assert cut_short(bench, name, partial(die_at, bench.kept(name), moment)).status == -9


def test_another_command_starts_afresh_and_says_why(bench: Bench, whole: Path) -> None:
    killed(bench, "other")
    run = bench.ran("other", "--seed", "5", "--samples", "9")
    assert run.status == 0
    line = "starting afresh: another command left 1 of its blocks here"
    assert f"{line} (samples was 8, is 9, seed was 0, is 5)" in run.stdout
    assert done(run) == 0 and not same(bench.target("other"), whole)


def test_a_run_is_begun_anew_when_asked(bench: Bench, whole: Path) -> None:
    killed(bench, "fresh")
    run = bench.ran("fresh", "--fresh")
    assert run.status == 0 and done(run) == 0 and same(bench.target("fresh"), whole)


def test_a_command_that_is_refused_takes_nothing_from_another(bench: Bench, whole: Path) -> None:
    killed(bench, "refused")
    (bench.home / "blank.jsonl").write_text('{"text": " "}\n')
    run = bench.ran("refused", "--calibration", str(bench.home / "blank.jsonl"))
    assert run.status == 2 and "no usable line" in run.stderr
    assert done(gone_on(bench, whole, "refused")) == 1


def test_a_parent_that_changed_is_another_command(bench: Bench, tmp_path: Path) -> None:
    moved = Bench(tmp_path)
    shutil.copytree(bench.home / "parent", tmp_path / "parent")
    calibration_file(tmp_path)
    killed(moved, "a")
    held = load_file(tmp_path / "parent" / "model.safetensors")
    held["model.norm.weight"] += 1
    save_file(held, tmp_path / "parent" / "model.safetensors", metadata={"format": "pt"})
    run = moved.ran("a")
    assert run.status == 0 and done(run) == 0 and "(weights changed)" in run.stdout


def test_a_layer_without_a_solution_leaves_nothing(bench: Bench) -> None:
    (bench.home / "unsolved").mkdir()
    run = bench.ran("unsolved", first=without_solution)
    assert run.status == 2 and "could not be solved: its solution is not finite" in run.stderr
    assert "when run again" not in run.stderr and not bench.kept("unsolved").exists()


def without_solution() -> None:
    """As for the last block: what is looked at before leaves no tiny model that has none."""
    stock = gptq.solve

    def solve(weight: Tensor, *given: Any) -> Solution:
        if not left:
            raise SolveError("its solution is not finite")
        left.pop()
        return stock(weight, *given)

    left = [None] * 9  # stacks of layers, four to a block
    gptq.solve = solve  # type: ignore[assignment] # of this process, which ends with it


def test_self_written_text_is_not_written_twice(bench: Bench, tmp_path: Path) -> None:
    own = Bench(tmp_path)
    shutil.copytree(bench.home / "parent", tmp_path / "parent")
    (tmp_path / "a").mkdir()
    words = [w for w in own.words("a") if w != "--calibration" and not w.endswith(".jsonl")]
    first = partial(die_at, own.kept("a"), MOMENTS["before the block has its name"])
    run = warm.begin(*words, said=tmp_path / "one", first=first)
    assert run.status() == -signal.SIGKILL and "the model writes 8 x 32" in run.stdout
    shutil.rmtree(tmp_path / "cache")
    run = warm.begin(*words, said=tmp_path / "two")
    assert run.status() == 0 and "the model writes" not in run.stdout


def test_a_plan_that_was_measured_is_kept(bench: Bench) -> None:
    """The formats of a mixed artifact do not depend on where its run was cut short."""
    budget = ("--bits-per-weight", "10")
    for name in ("budget", "budget-cut"):
        (bench.home / name).mkdir()
    assert bench.ran("budget", *budget).status == 0
    dies = partial(die_at, bench.kept("budget-cut"), MOMENTS["before the block has its name"])
    cut = bench.ran("budget-cut", *budget, first=dies)
    after = bench.ran("budget-cut", *budget)
    assert cut.status == -signal.SIGKILL and after.status == 0, after.stderr
    assert "nats foreseen" in cut.stdout and "nats foreseen" not in after.stdout
    assert done(after) == 1
    assert same(bench.target("budget-cut"), bench.target("budget"))
