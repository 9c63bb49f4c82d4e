"""`proof.compare`: right figures in manifest and card, and no artifact the worse for a failure."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from quant import artifact, recipe
from quant.errors import ArtifactError, CompareError, TooLossy
from quant.intake.source import Tensors
from quant.proof import card, compare
from quant.proof.compare import Found, Order
from quant.proof.evidence import TextFidelity
from tests import tiny
from tests.test_pipeline import Crash, calibration_file, letters, quantize

SCHEMES = ("w4a16", "w8a16", "w8a8")


class Told:
    """Keeps what it is told; raises `Crash`, or Ctrl-C's exception, when a window is done."""

    def __init__(self, crash: type[BaseException] | None = None) -> None:
        self.lines: list[str] = []
        self.steps: list[tuple[str, int, int]] = []
        self._crash = crash

    def say(self, line: str) -> None:
        self.lines.append(line)

    def measured(self, name: str, done: int, total: int) -> None:
        self.steps.append((name, done, total))
        if self._crash is not None:
            raise self._crash


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent, an artifact of each scheme, a text and a quiz."""
    home = tmp_path_factory.mktemp("compare")
    parent = tiny.model_folder(home / "parent")
    texts = calibration_file(home)
    for scheme in SCHEMES:
        quantize(parent, home / scheme, scheme=scheme, texts=texts, samples=8)
    (home / "book.txt").write_text("\n".join(letters(seed=5)))
    lines = ({"question": q, "choices": ["fox", "dog", "a"], "answer": n % 3}
             for n, q in enumerate(letters(seed=6, lines=10)))  # fmt: skip
    (home / "quiz.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return home


@pytest.fixture
def folder(home: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(home / "w4a16", tmp_path / "mine"))


def run(home: Path, folder: Path, told: Told | None = None, **order: Any) -> Found:
    drawn = recipe.draw({"windows": order.pop("windows", 6), "length": 48})
    parent = order.pop("parent", home / "parent")
    asked = Order(str(parent), folder, cache=home / "cache", **order)
    return compare.run(drawn, asked, told or Told())


def of_text(found: Found) -> TextFidelity:
    assert found.fidelity.text is not None and found.trace is not None
    assert len(found.trace.kl) == found.fidelity.text.predictions
    return found.fidelity.text


def intact(folder: Path) -> None:
    manifest = artifact.read(folder)
    assert manifest is not None
    artifact.verify(folder, manifest)


def test_the_result_is_in_the_manifest_and_in_the_card(home: Path, folder: Path) -> None:
    before, told = artifact.read(folder), Told()
    found = run(home, folder, told, text=home / "book.txt", choices=(home / "quiz.jsonl",))
    manifest = artifact.read(folder)
    assert before is not None and manifest == found.manifest
    assert manifest is not None and manifest.fidelity == found.fidelity
    same: dict[str, Any] = {"fidelity": None, "files": {}}
    assert manifest.model_copy(update=same) == before.model_copy(update=same)
    assert (folder / card.NAME).read_text() == card.text(manifest, "mine")
    assert f"{of_text(found).mean_kl.value:.4g}" in (folder / card.NAME).read_text()
    intact(folder)
    assert told.steps[:6] == [("book.txt", done, 6) for done in range(1, 7)]
    assert told.steps[6:] == [("quiz.jsonl", done, 10) for done in range(1, 11)]


def test_coarser_quantization_is_further_away(home: Path, tmp_path: Path) -> None:
    found = {}
    for scheme in SCHEMES:
        copied = Path(shutil.copytree(home / scheme, tmp_path / scheme))
        found[scheme] = of_text(run(home, copied, text=home / "book.txt"))
    assert 0 < found["w8a16"].mean_kl.high < found["w8a8"].mean_kl.low
    assert found["w8a8"].mean_kl.high < found["w4a16"].mean_kl.low
    assert found["w8a16"].top1_agreement.value > found["w4a16"].top1_agreement.value
    assert len({figures.parent_perplexity.value for figures in found.values()}) == 1


def test_a_fault_of_ours_in_reading_the_parent_is_a_distance(
    home: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It makes the artifact and is there when that is measured: as a fault of intake would be."""
    sound = of_text(run(home, folder, text=home / "book.txt"))
    read = Tensors.get

    def wrong(tensors: Tensors, name: str) -> Tensor:
        tensor = read(tensors, name)
        return tensor.flip(0) if name == "lm_head.weight" else tensor

    monkeypatch.setattr(Tensors, "get", wrong)
    made = quantize(home / "parent", tmp_path / "wrong", texts=home / "texts.jsonl", samples=8)
    found = of_text(run(home, made.folder, text=home / "book.txt"))
    assert found.parent_perplexity == sound.parent_perplexity
    assert found.mean_kl.low > 10 * sound.mean_kl.high


def test_without_a_file_the_model_writes_what_did_not_calibrate_it(
    home: Path, folder: Path
) -> None:
    found = of_text(run(home, folder, windows=2))
    assert (found.name, found.windows) == ("self-written text", 2)


def test_calibration_lines_measure_too(home: Path, folder: Path) -> None:
    found = of_text(run(home, folder, calibration=home / "texts.jsonl"))
    assert (found.name, found.windows) == ("texts.jsonl", 6)


def test_choices_alone_leave_the_text_as_it_was_measured(home: Path, folder: Path) -> None:
    earlier = run(home, folder, text=home / "book.txt")
    later = run(home, folder, choices=(home / "quiz.jsonl",))
    assert later.trace is None and later.fidelity.text is None
    kept = later.manifest.fidelity
    assert kept is not None and kept.text == of_text(earlier)
    [quiz] = kept.choices
    assert quiz.questions == 10 and 0 <= quiz.flips.value <= 1
    change = quiz.accuracy.value - quiz.parent_accuracy.value
    assert change == pytest.approx(quiz.wrong_to_right.value - quiz.right_to_wrong.value)
    intact(folder)


def test_another_model_is_refused_with_both_fingerprints(home: Path, folder: Path) -> None:
    other = tiny.model_folder(folder.parent / "other", seed=1)
    manifest = artifact.read(folder)
    assert manifest is not None
    with pytest.raises(CompareError) as caught:
        run(home, folder, parent=other, text=home / "book.txt")
    for digest in (manifest.parent.weights, artifact.weights_fingerprint(other)):
        assert digest[:12] in str(caught.value)
    assert str(home / "parent") in str(caught.value)


def test_merged_adapters_must_be_given_again(home: Path, tmp_path: Path) -> None:
    loras = [
        tiny.adapter_folder(tmp_path / f"lora{seed}", home / "parent", seed=seed) for seed in (0, 1)
    ]
    merged = quantize(
        home / "parent", tmp_path / "merged", texts=home / "texts.jsonl", adapters=(loras[0],),
        samples=8,
    )  # fmt: skip
    text = home / "book.txt"
    near = of_text(run(home, merged.folder, text=text, adapters=(loras[0],)))
    assert near.mean_kl.value < 1
    digest = merged.manifest.adapters[0].digest[:12]
    for given, says in (((), "no adapter"), ((loras[1],), "")):
        with pytest.raises(CompareError, match=rf"has {digest} merged, --adapter gives {says}"):
            run(home, merged.folder, text=text, adapters=given)


@pytest.mark.parametrize("crash", [Crash, KeyboardInterrupt])
def test_a_run_that_ends_early_leaves_the_artifact_as_it_was(
    home: Path, folder: Path, crash: type[BaseException]
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(crash):
        run(home, folder, Told(crash), text=home / "book.txt")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_card_that_a_killed_run_left_is_written_again(home: Path, folder: Path) -> None:
    with (folder / card.NAME).open("a") as file:
        file.write("of the next manifest\n")
    run(home, folder, text=home / "book.txt")
    intact(folder)


def test_a_readme_of_the_users_stays(home: Path, folder: Path) -> None:
    (folder / card.NAME).write_text("# Mine\n")
    found = run(home, folder, text=home / "book.txt")
    assert (folder / card.NAME).read_text() == "# Mine\n"
    assert found.manifest.fidelity == found.fidelity


def test_an_altered_artifact_is_refused(home: Path, folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x99")
    with pytest.raises(ArtifactError, match="differs from what was sealed"):
        run(home, folder, text=home / "book.txt")
    with pytest.raises(ArtifactError, match="not an artifact of ours"):
        run(home, home / "parent", text=home / "book.txt")


def test_the_gate_lets_through_what_is_near_enough(home: Path, folder: Path) -> None:
    found = of_text(run(home, folder, text=home / "book.txt"))
    compare.check_limit(found, found.mean_kl.value, "")
    compare.check_limit(found, None, "")
    compare.check_limit(None, 0.0, "")
    with pytest.raises(TooLossy, match=r"mean KL .* is above 1e-06 nats; look at it") as caught:
        compare.check_limit(found, 1e-6, "look at it")
    assert caught.value.exit_status == 3
