"""`quant.bar`: stderr for people, stdout for programs, brackets of the user's as they are."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
from types import SimpleNamespace

import pytest
from rich.console import Console

from quant import bar as bar_module
from quant.artifact import LayerReport
from quant.bar import Bar, Lines, table

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


def test_without_a_terminal_there_is_a_line_for_each_tenth(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Bar("layers") as bar:
        for _ in range(2):  # two rounds
            for done in range(1, 211):
                bar.measured(f"layer {done}", done, 210)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 20
    assert [line.split()[1] for line in lines[:10]] == [f"{n}/210" for n in range(21, 211, 21)]
    assert lines[0].endswith(" left: layer 21") and "left" not in lines[9]


def test_the_clock_begins_with_what_was_said_last_before_the_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(bar_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with Bar("layers") as bar:
        now[0] = 100.0
        bar.say("solving")
        for done in range(1, 21):
            now[0] += 1
            bar.measured("layer", done, 20)
    lines = capsys.readouterr().err.splitlines()[1:]
    assert lines[0] == "quantserve: 2/20 in 0:00:02, about 0:00:18 left: layer"
    assert lines[-1] == "quantserve: 20/20 in 0:00:20: layer"


@pytest.mark.parametrize(("width", "has_bar"), [(120, True), (60, False), (40, False)])
def test_in_a_narrow_terminal_the_bar_goes_before_the_times(*, width: int, has_bar: bool) -> None:
    screen = io.StringIO()
    with Bar("layers") as bar:
        bar._console = bar._progress.live.console = Console(
            file=screen, width=width, force_terminal=True, color_system=None, legacy_windows=False
        )
        bar._progress.live.auto_refresh = False
        bar.solved(REPORT.model_copy(update={"name": "model.layers.11.mlp.down_proj"}), 80, 210)
        bar._progress.refresh()
    last = screen.getvalue().replace("\r", "\n").split("\n")
    shown = next(line for line in reversed(last) if "80/210" in line)
    assert "0:00:00 left -:--:--" in shown and "e-03" in shown
    assert ("━" in shown) == has_bar
    assert "\n" not in shown and len(shown.split("\x1b")[0]) <= width


def test_a_table_is_as_wide_as_it_has_to_be() -> None:
    long = "model.layers.0." + "deep." * 30 + "weight"
    shown = table([("layer", "loss", "bits"), (long, "1e-3", "4")], figures=True)
    head, row = shown.splitlines()
    assert row == f"{long}  1e-3     4" and head.rstrip() == head
    assert table([("a", "b"), ("long", "")]) == "a     b\nlong\n"


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


@pytest.mark.parametrize("no_color", ["", "1"])
def test_no_color_is_honoured_in_a_terminal(no_color: str) -> None:
    code = "from quant.bar import Bar\nwith Bar('x') as bar: bar.measured('a', 1, 2)"
    ours, theirs = pty.openpty()
    env = os.environ | {"NO_COLOR": no_color, "TERM": "xterm-256color", "COLUMNS": "100"}
    with subprocess.Popen([sys.executable, "-c", code], stderr=theirs, env=env):
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # the other end is closed
            while piece := os.read(ours, 4096):
                shown += piece
    os.close(ours)
    assert "━".encode() in shown
    assert bool(re.search(rb"\x1b\[[\d;]*3\d", shown)) == (not no_color)
