"""`quant.estimate`: told before a run starts, and refused where memory or disk will not do."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quant import estimate, pipeline, recipe, scribe, tokens
from quant.errors import RoomError, SpaceError
from quant.estimate import Run
from quant.intake import source
from quant.pipeline import Order
from quant.solver import blocks, devices, preflight
from quant.solver.preflight import FLOAT
from tests import families, test_selfcheck, tiny
from tests.test_blocks import CPU
from tests.test_pipeline import Told, calibration_file

PLENTY = 10**15  # bytes


def run_of(folder: Path, *, writes_text: bool = False, gated: bool = False, **asked: Any) -> Run:
    layers = asked.pop("layers", 2)
    model = source.open(str(tiny.model_folder(folder, layers=layers)), cache=folder)
    plan = recipe.build({"samples": 8, "length": 32, **asked})
    return Run(plan, model, blocks.skeleton(model, CPU), 200_000, writes_text, gated)


def test_a_run_that_fits_is_told_in_one_line(tmp_path: Path) -> None:
    found = estimate.checked(run_of(tmp_path), tmp_path / "out", 0, PLENTY)
    assert 0 < found.memory < found.memory_free and 0 < found.disk < found.disk_free
    assert found.seconds > 0 and found.operations > 0 and found.speed > 0
    words = str(found)
    assert words.startswith("needs about ") and "of memory" in words and "of disk" in words
    assert found.facts()["memory"] == found.memory


def test_more_calibration_needs_more_of_everything(tmp_path: Path) -> None:
    few = estimate.checked(run_of(tmp_path), tmp_path / "out", 0, PLENTY)
    many = estimate.checked(run_of(tmp_path, samples=1000, length=128), tmp_path / "out", 0, PLENTY)
    assert many.disk > few.disk and many.operations > few.operations
    assert many.memory > few.memory


def test_what_lies_on_disk_already_is_not_needed_again(tmp_path: Path) -> None:
    asked = run_of(tmp_path)
    whole = estimate.checked(asked, tmp_path / "out", 0, PLENTY).disk
    assert estimate.checked(asked, tmp_path / "out", 100_000, PLENTY).disk == whole - 100_000
    assert estimate.checked(asked, tmp_path / "out", 10**12, PLENTY).disk == 0


def test_a_text_that_has_to_be_written_takes_work(tmp_path: Path) -> None:
    given = estimate.checked(run_of(tmp_path), tmp_path / "out", 0, PLENTY)
    written = estimate.checked(run_of(tmp_path, writes_text=True), tmp_path / "out", 0, PLENTY)
    assert written.operations > given.operations


def test_the_questions_in_the_end_need_the_head_and_both_models_states(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    (asking,) = (each for each in estimate.phases(run, run.units()) if "asking" in each.name)
    asked = sum(map(len, scribe.questions(tokens.load_tokenizer(run.opened.folder))))
    width = run.given.width
    assert asking.bytes > FLOAT * width * (2 * min(asked, estimate._ASKED) + tiny.VOCAB)


def test_states_that_no_disk_holds_are_refused(tmp_path: Path) -> None:
    asked = run_of(tmp_path, samples=65_536, length=131_072)
    with pytest.raises(SpaceError, match="of disk"):
        estimate.checked(asked, tmp_path / "out", 0, PLENTY)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"samples": 512, "length": 512}, "solving its largest block needs .* fewer --samples"),
        ({"samples": 1, "writes_text": True}, "calibration text needs .* give a calibration file"),
        ({"samples": 1, "gated": True}, "beside its parent needs .* leave --max-kl out"),
        ({"bits_per_weight": 6.0, "length": 512}, "measuring formats needs"),
    ],
)
def test_too_little_memory_names_what_takes_it_and_the_way_out(
    asked: dict[str, Any], named: str, tmp_path: Path
) -> None:
    run = run_of(tmp_path, layers=24, **asked)
    blocks = preflight.units(run.decoder.shapes())
    just = max(phase.bytes for phase in estimate.phases(run, blocks)) + estimate.BESIDE
    with pytest.raises(RoomError, match=named):
        estimate.checked(run, tmp_path / "out", 0, just - 1)
    assert estimate.checked(run, tmp_path / "out", 0, just).memory_free >= just


def test_a_refused_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = tiny.model_folder(tmp_path / "parent")
    order = Order(str(parent), tmp_path / "made" / "out", calibration_file=calibration_file(parent))
    monkeypatch.setattr(devices, "left", lambda _device: 1000)
    told = Told()
    with pytest.raises(RoomError, match="0 MB of cpu's is free"):
        pipeline.run(recipe.build({"samples": 8, "length": 32}), order, told)
    assert told.lines == [f"opening {parent}"]
    assert not list((tmp_path / "made").iterdir())


def test_embeddings_for_every_block_are_counted(tmp_path: Path) -> None:
    """Gemma-4's."""
    folder = test_selfcheck.folder(tmp_path / "model", "gemma4_text")
    model = source.open(str(folder), cache=tmp_path)
    plan = recipe.build({"samples": 8, "length": 32})
    run = Run(plan, model, blocks.skeleton(model, CPU), 200_000, writes_text=False, gated=False)
    config = model.config
    a_token = config.num_hidden_layers * config.hidden_size_per_layer_input * FLOAT
    assert run.given.given_beside >= 8 * 32 * a_token
    units = run.units()
    without = preflight.memory(units, replace(run.given, beside=0))
    assert preflight.memory(units, run.given) == without + run.given.given_beside


def test_scores_that_are_held_whole_are_counted(tmp_path: Path) -> None:
    folder = families.folder(tmp_path / "model", "gemma2")
    model = source.open(str(folder), cache=tmp_path)
    plan = recipe.build({"samples": 2, "length": 256})
    run = Run(plan, model, blocks.skeleton(model, CPU), 200_000, writes_text=False, gated=False)
    assert run.given.heads == model.config.num_attention_heads
    scores = 2 * run.given.heads * 256**2 * FLOAT
    fused = preflight.memory(run.units(), replace(run.given, heads=0))
    assert preflight.memory(run.units(), run.given) >= fused + 2 * scores


@pytest.mark.parametrize(
    ("asked", "named"), [({"writes_text": True}, "writes"), ({"gated": True}, "beside its parent")]
)
def test_files_that_a_model_is_loaded_from_are_counted(
    asked: dict[str, Any], named: str, tmp_path: Path
) -> None:
    """Their pages are the process's until all of them are copied."""
    run = run_of(tmp_path, **asked)
    (phase,) = (each for each in estimate.phases(run, run.units()) if named in each.name)
    copies = 2 if "gated" in asked else 1
    parameters = sum(math.prod(h.shape) for h in run.opened.tensors.headers.values())
    assert phase.bytes >= copies * FLOAT * parameters + run.opened.bytes
