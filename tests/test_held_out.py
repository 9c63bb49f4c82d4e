"""`proof.held_out`: windows that cover a text once, drawn by the seed, and never calibrated on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from quant import calibration, tokens
from quant.errors import CalibrationError, RecipeError
from quant.intake import source
from quant.intake.source import Source, quiet
from quant.proof import held_out
from quant.proof.fidelity import Sample
from quant.recipe import Recipe
from tests import tiny
from tests.test_pipeline import letters

ROWS = Recipe(samples=6, length=32)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Source:
    home = tmp_path_factory.mktemp("held-out")
    return source.open(str(tiny.model_folder(home / "parent", layers=1)), cache=home / "cache")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("\n".join(letters(seed=0)))
    return path


def ids(sample: Sample) -> set[tuple[int, ...]]:
    return {tuple(window.tolist()) for window in sample.windows}


def test_windows_are_pieces_of_the_text_that_start_with_bos(opened: Source, text: Path) -> None:
    sample = held_out.from_text(opened, text, ROWS, quiet)
    assert (sample.name, len(sample.windows)) == ("book.txt", 6)
    whole = tokens.of_text(text.read_text(), tokens.load_tokenizer(opened.folder))
    pieces = {tuple(whole[at : at + 31]) for at in range(1, len(whole), 31)}
    for window in ids(sample):
        assert window[0] == 0 and window[1:] in pieces


def test_the_seed_draws_the_windows(opened: Source, text: Path) -> None:
    one, again, other = (
        held_out.from_text(opened, text, ROWS.model_copy(update={"seed": seed}), quiet)
        for seed in (0, 0, 1)
    )
    assert one.digest == again.digest != other.digest
    assert ids(one) == ids(again) != ids(other)


def test_a_short_text_is_used_whole_and_that_is_said(opened: Source, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("the quick brown fox " * 12)
    said: list[str] = []
    sample = held_out.from_text(opened, tmp_path / "short.txt", ROWS, said.append)
    assert 0 < len(sample.windows) < 6
    assert said == [f"{tmp_path / 'short.txt'} holds {len(sample.windows)} windows of 32 tokens, not 6"]  # fmt: skip # noqa: E501


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read"),
        (b"  \n", "holds no text"),
        (b"ab\xff\xfe", "not UTF-8 text: byte 2"),
        ("the fox".encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
    ],
)
def test_a_file_without_text_is_refused(
    opened: Source, tmp_path: Path, content: bytes | None, says: str
) -> None:
    file = tmp_path / "book.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CalibrationError, match=says):
        held_out.from_text(opened, file, ROWS, quiet)


def test_a_mark_is_no_part_of_the_text(opened: Source, text: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(text.read_text(), "utf-8-sig")
    marked = held_out.from_text(opened, tmp_path / "book.txt", ROWS, quiet)
    assert marked.digest == held_out.from_text(opened, text, ROWS, quiet).digest


def test_windows_longer_than_the_model_reads_are_refused(opened: Source, text: Path) -> None:
    with pytest.raises(RecipeError, match="length 513 exceeds the model's 512 positions"):
        held_out.from_text(opened, text, Recipe(length=513), quiet)


def test_what_the_model_writes_is_not_what_it_wrote_to_be_calibrated(opened: Source) -> None:
    for calibrated in (0, 5):
        recipe = ROWS.model_copy(update={"seed": calibrated})
        rows = calibration.prepare(opened, recipe, None, quiet).input_ids
        sample = held_out.self_written(opened, ROWS, calibrated, quiet)
        assert not {tuple(row) for row in rows.tolist()} & ids(sample)
    last = ROWS.model_copy(update={"seed": 2**63 - 1})
    assert held_out.self_written(opened, last, 3, quiet).digest != sample.digest


def test_the_last_tenth_of_a_file_is_held_out_and_calibrates_nothing(
    opened: Source, tmp_path: Path
) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in letters(seed=3)))
    everything = Recipe(samples=4096, length=32)
    sample = held_out.from_lines(opened, file, everything, quiet, "held-out")
    rest = calibration.prepare(opened, everything, file, quiet, "calibrating")
    whole = calibration.prepare(opened, everything, file, quiet)
    tokenizer = tokens.load_tokenizer(opened.folder)
    held = [token for line in letters(seed=3)[-4:] for token in tokens.of_text(line, tokenizer)]
    inside = torch.cat(sample.windows)
    assert sorted(set(inside.tolist())) == sorted(set(held))
    assert int(rest.mask.sum()) < int(whole.mask.sum())
    assert not {tuple(row) for row in rest.input_ids.tolist()} & ids(sample)


def test_one_line_cannot_be_divided(opened: Source, tmp_path: Path) -> None:
    file = tmp_path / "one.jsonl"
    file.write_text('{"text": "the quick brown fox"}\n')
    with pytest.raises(CalibrationError, match="two are needed to hold one out"):
        held_out.from_lines(opened, file, ROWS, quiet, "held-out")


def test_a_line_of_one_token_measures_nothing(opened: Source, tmp_path: Path) -> None:
    file = tmp_path / "dot.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    opened_rows = held_out.from_lines(opened, file, ROWS, quiet)
    assert all(len(window) >= 2 for window in opened_rows.windows)
