"""`adapter compare`: merge or swap with numbers, each way held against parent and adapter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from quant import artifact, recipe
from quant.cli import app
from quant.errors import AdapterError, CompareError
from quant.lora import adapter as lora
from quant.lora import export
from quant.proof import compare, ways
from quant.proof.ways import Order, Way
from tests import tiny, variants
from tests.test_export import Heard
from tests.test_pipeline import calibration_file, letters, quantize


class Told(Heard):
    """Hears everything."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def foreseen(self, line: str, facts: Any) -> None:
        assert line and facts

    def solved(self, report: artifact.LayerReport, done: int, total: int) -> None:
        assert report and done <= total


@dataclass(frozen=True)
class Home:
    """A parent with outliers, artifacts of it, and an adapter."""

    folder: Path
    lora: Path

    def order(self, scheme: str, **more: Any) -> Order:
        asked = compare.Order(
            str(self.folder / "parent"),
            self.folder / scheme,
            (more.pop("adapter", self.lora),),
            text=self.folder / "book.txt",
            choices=more.pop("choices", ()),
            cache=self.folder / "cache",
        )
        return Order(asked, **more)

    def ways(self, scheme: str, told: Told | None = None, **more: Any) -> list[Way]:
        draw = recipe.draw({"windows": 6, "length": 48})
        return ways.run(draw, self.order(scheme, **more), told or Told())


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with variants.one_thread():
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    folder = tmp_path_factory.mktemp("ways")
    parent = tiny.model_folder(folder / "parent", dtype=torch.float32)
    tiny.plant_outliers(parent)
    texts = calibration_file(folder)
    for scheme in ("w4a16", "w8a8"):
        quantize(parent, folder / scheme, scheme=scheme, texts=texts, samples=8)
    trained, _ = variants.trained(folder / "lora", parent, targets="all-linear")
    quantize(parent, folder / "merged", texts=texts, adapters=(trained,), samples=8)
    (folder / "book.txt").write_text("\n".join(letters(seed=5)))
    lines = ({"question": q, "choices": ["fox", "dog", "a"], "answer": n % 3}
             for n, q in enumerate(letters(seed=6, lines=10)))  # fmt: skip
    (folder / "quiz.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Home(folder, trained)


def kl(way: Way) -> float:
    assert way.text is not None
    return way.text.mean_kl.value


def test_both_ways_are_measured_against_parent_and_adapter(home: Home) -> None:
    quiz = (home.folder / "quiz.jsonl",)
    beside, merged = home.ways("w4a16", merged=home.folder / "merged", choices=quiz)
    assert (beside.name, merged.name) == ("beside", "merged")
    assert beside.text is not None and merged.text is not None
    # One and the same reference.
    assert beside.text.parent_perplexity == merged.text.parent_perplexity
    assert kl(beside) != kl(merged)
    assert [q.questions for way in (beside, merged) for q in way.choices] == [10, 10]
    one = artifact.read(home.folder / "merged")
    assert one is not None and merged.bytes == merged.bytes_more == one.bytes_after
    base = artifact.read(home.folder / "w4a16")
    assert base is not None and beside.bytes == base.bytes_after + beside.bytes_more
    assert beside.bytes_more < merged.bytes_more
    assert beside.latency is None


def test_beside_a_smoothed_artifact_the_adapter_is_in_its_units(home: Home) -> None:
    """W8A8 loses a tenth of what W4A16 does; an adapter in wrong units would lose far more."""
    [four], [eight] = home.ways("w4a16"), home.ways("w8a8")
    assert kl(eight) < 0.1 * kl(four)


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8"])
def test_an_exported_adapter_is_what_is_measured_without_one(
    home: Home, tmp_path: Path, scheme: str
) -> None:
    export.run(export.Order(home.lora, home.folder / scheme, tmp_path / "ready"), Heard())
    beside, ready = home.ways(scheme, ready=(tmp_path / "ready",))
    assert ready.name == str(tmp_path / "ready") and ready.text == beside.text


def test_the_merged_artifact_is_made_on_the_way(home: Home, tmp_path: Path) -> None:
    told = Told()
    _, merged = home.ways("w4a16", told, merge_into=tmp_path / "made")
    made = artifact.read(tmp_path / "made")
    assert made is not None and [a.name for a in made.adapters] == ["lora"]
    was = artifact.read(home.folder / "w4a16")
    assert was is not None and made.recipe == was.recipe
    assert merged.artifact == "made" and kl(merged) < 1
    assert any("its own calibration text" in line for line in told.lines)
    texts = home.folder / "texts.jsonl"
    home.ways("w4a16", merge_into=tmp_path / "alike", merge_texts=texts)
    alike = artifact.read(tmp_path / "alike")
    assert alike is not None and alike.calibration == was.calibration


def test_what_does_not_belong_together_is_refused(home: Home, tmp_path: Path) -> None:
    other, _ = variants.trained(tmp_path / "other", home.folder / "parent", seed=1)
    with pytest.raises(CompareError, match="merged, --adapter gives"):
        home.ways("w4a16", adapter=other, merged=home.folder / "merged")
    with pytest.raises(CompareError, match="merged, --adapter gives no adapter"):
        home.ways("merged")
    dora, _ = variants.trained(tmp_path / "dora", home.folder / "parent", use_dora=True)
    with pytest.raises(AdapterError, match="DoRA"):
        home.ways("w4a16", adapter=dora)


def words(home: Home, *more: object) -> list[str]:
    parent, text = home.folder / "parent", home.folder / "book.txt"
    fixed = ["--parent", parent, "--base", home.folder / "w4a16", "--text", text, "--windows", 3]
    given = ("adapter", "compare", home.lora, *fixed, "--length", 32, *more)
    return [str(word) for word in given]


def test_the_table_has_a_column_for_each_way(home: Home) -> None:
    plot = home.folder / "ways.png"
    ran = CliRunner().invoke(app, words(home, "--merged", home.folder / "merged", "--plot", plot))
    assert ran.exit_code == 0, ran.output
    head, *lines = ran.stdout.splitlines()
    assert head.split() == ["beside", "merged"] and lines[0].split() == ["w4a16", "merged"]
    for name in ("mean KL", "same likeliest token", "of each further one, MB"):
        assert any(line.startswith(name) for line in lines), ran.stdout
    assert "served" not in ran.stdout and plot.stat().st_size > 10_000


def test_json_holds_every_figure_and_its_interval(home: Home) -> None:
    ran = CliRunner().invoke(app, words(home, "--json"))
    assert ran.exit_code == 0, ran.output
    [way] = json.loads(ran.stdout.splitlines()[-1])["ways"]
    figure = Way.model_validate(way).text
    assert figure is not None and figure.mean_kl.low <= figure.mean_kl.value <= figure.mean_kl.high


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (("--merged", "a", "--merge", "b"), "give one of them"),
        (("--calibration", "c"), "give one"),
        (("--merge-calibration", "c"), "is for --merge"),
        (("--plot", "nowhere/ways.png"), "its folder does not exist"),
    ],
)
def test_two_answers_to_one_question_are_refused(
    home: Home, extra: tuple[str, ...], told: str
) -> None:
    ran = CliRunner().invoke(app, words(home, *extra))
    assert ran.exit_code != 0 and told in str(ran.exception)


@pytest.mark.parametrize("option", [("--latency",), ("--plot", "ways.png")])
def test_what_needs_a_text_is_refused_without_one(home: Home, option: tuple[str, ...]) -> None:
    fixed = [str(word) for word in words(home) if word not in ("--text",)]
    fixed.remove(str(home.folder / "book.txt"))
    ran = CliRunner().invoke(app, [*fixed, "--choices", str(home.folder / "quiz.jsonl"), *option])
    assert ran.exit_code != 0 and f"{option[0]} needs a text" in str(ran.exception)


def test_what_a_server_gets_is_the_adapter_or_its_export(home: Home, tmp_path: Path) -> None:
    """With the rank that a server has to be started with."""
    plain = lora.read_trained(home.lora)
    base = home.folder / "w4a16"
    assert ways.to_serve(plain, base, tmp_path / "no", Told()) == (plain.folder, 16)
    assert not (tmp_path / "no").exists()
    parent = home.folder / "parent"
    shifted, _ = variants.trained(tmp_path / "shifted", parent, init_lora_weights="pissa", r=12)
    place, rank = ways.to_serve(lora.read_trained(shifted), base, tmp_path / "ready", Told())
    assert (place, rank) == (tmp_path / "ready", 32) and lora.read(place).rank == 24
