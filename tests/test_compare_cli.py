"""`quantserve compare` and `quantize --max-kl` as a user runs them: output and exit status."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from quant import artifact
from quant.proof.evidence import Fidelity
from tests import tiny
from tests.test_pipeline import calibration_file, letters, quantize
from tests.test_quant_cli import SMALL, Ran, ran

FEW = ("--windows", "3", "--length", "32")

# What a user gets wrong: the words after PARENT and ARTIFACT, and what the one line must say.
MISTAKES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "no text": (("--text", "{home}/nowhere.txt"), ("nowhere.txt", "cannot be read")),
    "bad line": (("--choices", "{home}/broken.jsonl"), ("broken.jsonl:2", "malformed")),
    "two texts": (("--text", "a", "--calibration", "b"), ("--text and --calibration", "give one")),
    "no windows": (("--windows", "0"), ("windows", "greater than or equal to 1")),
    "long windows": (("--length", "600", "--text", "{home}/book.txt"), ("600", "512 positions")),
    "gate without text": (("--choices", "q", "--max-kl", "1"), ("--max-kl", "add --text")),
    "no limit": (("--max-kl", "nan"), ("max-kl is nan", "from 0 up")),
    "plot to nowhere": (("--plot", "{home}/no/where.png"), ("--plot", "does not exist")),
    "device": (("--device", "cuda:63"), ("cuda:63",)),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("compare-cli")
    texts = calibration_file(home)
    quantize(tiny.model_folder(home / "parent"), home / "out", texts=texts, samples=8)
    (home / "book.txt").write_text("\n".join(letters(seed=5)))
    good = {"question": "what runs?", "choices": ["a fox", "a dog"], "answer": 0}
    (home / "quiz.jsonl").write_text((json.dumps(good) + "\n") * 4)
    (home / "broken.jsonl").write_text(json.dumps(good) + "\n{never closed\n")
    return home


@pytest.fixture
def folder(home: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(home / "out", tmp_path / "out"))


def compared(home: Path, folder: Path, *more: str) -> Ran:
    cache = ("--cache", str(home / "cache"))
    words = ("compare", str(home / "parent"), str(folder), *FEW, *cache, *more)
    return ran(*words, said=folder.parent / f"said-{len(list(folder.parent.iterdir()))}")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_changes_nothing(
    mistake: str, home: Path, tmp_path: Path
) -> None:
    more, expected = MISTAKES[mistake]
    before = (home / "out" / artifact.MANIFEST).read_bytes()
    words = (word.format(home=home) for word in more)
    run = ran("compare", str(home / "parent"), str(home / "out"), "--json", *words,
              said=tmp_path / "said")  # fmt: skip
    assert run.status == 2
    assert run.stderr.startswith("quantserve: ") and run.stderr.count("\n") == 1, run.stderr
    assert all(word in run.stderr for word in expected), run.stderr
    assert (home / "out" / artifact.MANIFEST).read_bytes() == before


def test_a_table_a_picture_and_an_artifact_that_verifies(home: Path, folder: Path) -> None:
    picture = folder.parent / "found.png"
    run = compared(home, folder, "--text", str(home / "book.txt"), "--plot", str(picture),
                   "--choices", str(home / "quiz.jsonl"))  # fmt: skip
    assert run.status == 0, run.stderr
    for words in ("predictions in 3 windows", "mean KL(parent || artifact), nats", "95% interval"):
        assert words in run.stdout
    assert "quiz.jsonl: 4 questions" in run.stdout and "answers that flip" in run.stdout
    assert "quantserve: 4/4 in 0:" in run.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    verified = ran("inspect", str(folder), "--verify", said=folder.parent / "verified")
    assert (verified.status, verified.stderr) == (0, "")


def test_json_is_a_line_per_event_and_the_result_last(home: Path, folder: Path) -> None:
    run = compared(home, folder, "--json", "--text", str(home / "book.txt"))
    assert (run.status, run.stderr) == (0, "")
    *events, last = [json.loads(line) for line in run.stdout.splitlines()]
    manifest = artifact.read(folder)
    assert manifest is not None and Fidelity.model_validate(last) == manifest.fidelity
    assert [e["done"] for e in events if e["event"] == "measured"] == [1, 2, 3]


def test_a_shut_gate_is_status_3_and_one_line(home: Path, folder: Path) -> None:
    run = compared(home, folder, "--json", "--text", str(home / "book.txt"), "--max-kl", "1e-9")
    assert run.status == 3
    assert run.stderr.startswith("quantserve: mean KL ") and run.stderr.count("\n") == 1
    assert "is above 1e-09 nats" in run.stderr and str(folder) in run.stderr
    wide = compared(home, folder, "--json", "--text", str(home / "book.txt"), "--max-kl", "20")
    assert (wide.status, wide.stderr) == (0, "")


def test_quantize_behind_a_shut_gate_publishes_nothing(home: Path, tmp_path: Path) -> None:
    texts = ("--calibration", str(home / "texts.jsonl"))
    run = ran("quantize", str(home / "parent"), "--out", str(tmp_path / "out"), *texts, *SMALL,
              "--max-kl", "1e-9", "--json", said=tmp_path / "said")  # fmt: skip
    assert run.status == 3
    assert run.stderr.count("\n") == 1 and "out.rejected.json" in run.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"said", "out.rejected.json"}
