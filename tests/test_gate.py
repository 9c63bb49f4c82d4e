"""`proof.gate`: what is too far from its parent is not published, and says so beside the target."""

from __future__ import annotations

from pathlib import Path

import pytest

from quant import artifact, pipeline, recipe
from quant.artifact import Manifest
from quant.errors import CalibrationError, TooLossy
from quant.pipeline import Order
from tests import tiny
from tests.test_pipeline import Told, calibration_file

PLAN = recipe.build({"samples": 8, "length": 48})


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("gate") / "parent")


def quantize(parent: Path, target: Path, max_kl: float, texts: Path | None = None) -> Manifest:
    order = Order(
        str(parent), target, calibration_file=texts, cache=parent.parent / "cache", max_kl=max_kl
    )
    return pipeline.run(PLAN, order, Told())


def test_what_passes_is_published_with_its_figures(parent: Path, tmp_path: Path) -> None:
    (tmp_path / "out.rejected.json").write_text("an earlier try")
    manifest = quantize(parent, tmp_path / "out", 10.0)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert artifact.read(tmp_path / "out") == manifest
    artifact.verify(tmp_path / "out", manifest)
    assert manifest.fidelity is not None and manifest.fidelity.text is not None
    found = manifest.fidelity.text
    assert (found.name, found.windows) == ("self-written text", 16)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.count("# out\n") == 1 and f"{found.mean_kl.value:.4g}" in card


def test_what_does_not_pass_leaves_only_its_report(parent: Path, tmp_path: Path) -> None:
    report = tmp_path / "out.rejected.json"
    with pytest.raises(TooLossy) as caught:
        quantize(parent, tmp_path / "out", 1e-9)
    assert str(report) in str(caught.value) and "is above 1e-09 nats" in str(caught.value)
    assert list(tmp_path.iterdir()) == [report]
    manifest = Manifest.model_validate_json(report.read_bytes())
    assert len(manifest.layers) == 14
    assert manifest.fidelity is not None and manifest.fidelity.text is not None
    assert manifest.fidelity.text.mean_kl.value > 1e-9


def test_the_last_tenth_of_a_file_judges_what_the_rest_calibrated(
    parent: Path, tmp_path: Path
) -> None:
    texts = calibration_file(tmp_path)
    held = quantize(parent, tmp_path / "out", 10.0, texts)
    lines = texts.read_text().splitlines(keepends=True)
    texts.write_text("".join(lines[:36]))
    order = Order(str(parent), tmp_path / "rest", calibration_file=texts)
    rest = pipeline.run(PLAN, order, Told())
    assert held.calibration == rest.calibration
    assert held.fidelity is not None and held.fidelity.text is not None
    assert held.fidelity.text.name == "texts.jsonl"


def test_a_file_too_short_to_divide_is_refused_at_once(parent: Path, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"text": "the quick brown fox"}\n')
    with pytest.raises(CalibrationError, match="two are needed to hold one out"):
        quantize(parent, tmp_path / "out", 1.0, tmp_path / "one.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["one.jsonl"]
