"""`bench.compensate` from training to the table, on a tiny model and made-up questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import compensate
from quant.lora import adapter as lora
from tests import tiny, variants
from tests.test_pipeline import letters


def test_it_trains_compensates_and_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = tiny.model_folder(tmp_path / "parent", chat=True)
    lines = ({"question": line[:60], "answer": line[60:]} for line in letters(seed=1, lines=60))
    exam = tmp_path / "exam.jsonl"
    exam.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    words = ["--model", parent, "--gsm8k", exam, "--out", out, "--steps", 2, "--samples", 4]
    with variants.one_thread():
        compensate.main([*map(str, words), "--windows", "2", "--ranks", "8", "--merged",
                         "--calibration", str(texts(tmp_path))])  # fmt: skip
    shown = capsys.readouterr().out
    assert "step 2/2" in shown and "| of the plain one's |" in shown and "first token" not in shown
    beside, plus, merged = (line.split(" | ") for line in shown.splitlines()[-3:])
    assert beside[0] == "| beside" and plus[0] == "| plus-8" and float(plus[4]) < 1
    assert merged[0] == "| merged" and merged[1] == merged[2] and float(merged[3][:6]) > 0
    trained, more = lora.read(out / "adapter"), lora.read(out / "plus-8")
    assert (trained.rank, more.rank) == (8, 16)
    # What calibrates and what measures are other questions than what trained.
    told = [(out / name).read_text() for name in ("domain.jsonl", "exam.jsonl")]
    asked = [json.loads(line)["question"] for line in exam.read_text().splitlines()]
    assert not any(json.dumps(each)[1:-1] in text for each in asked[:8] for text in told)
    assert not any(json.dumps(each)[1:-1] in told[0] and json.dumps(each)[1:-1] in told[1]
                   for each in asked)  # fmt: skip


def texts(folder: Path) -> Path:
    path = folder / "calibration.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in letters(seed=0)))
    return path
