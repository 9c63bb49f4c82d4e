"""`quant.bar`: stderr for people, stdout for programs, brackets of the user's as they are."""

from __future__ import annotations

import json

import pytest

from quant.artifact import LayerReport
from quant.bar import Bar, Lines

REPORT = LayerReport(name="model.layers.0.up_proj", loss=0.001, rounding_loss=0.01, damping=0.01)


def test_the_bar_writes_to_stderr_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("layers") as bar:
        bar.say("opening [odd]/name")
        bar.solved(REPORT, 1, 2)
        bar.measured("text [bold].txt", 2, 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("quantserve: opening [odd]/name\n")
    assert "text [bold].txt" in err and "2/2" in err


def test_a_bar_that_never_began_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("layers"):
        pass
    assert capsys.readouterr() == ("", "")


def test_lines_are_json_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines()
    lines.say("opening")
    lines.solved(REPORT, 1, 2)
    lines.measured("book.txt", 3, 8)
    out, err = capsys.readouterr()
    stage, layer, measured = map(json.loads, out.splitlines())
    assert stage == {"event": "stage", "message": "opening"}
    assert (layer["event"], layer["name"], layer["done"]) == ("layer", REPORT.name, 1)
    assert measured == {"event": "measured", "name": "book.txt", "done": 3, "total": 8}
    assert err == ""
