"""The parent's log: nobody who reads it, or does not, can hold the parent up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = """
import sys
from serve import console
console.LINES, console.FLUSH_S = 10, float(sys.argv[1])
log = console.Console()
for number in range(int(sys.argv[2])):
    log.say("line %d " % number + "x" * 1000)
log.close()
sys.stdout.write("went on")
"""


def said(flush_s: str, lines: str, stderr: int) -> str:
    done = subprocess.run(
        [sys.executable, "-c", CODE, flush_s, lines],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, timeout=300, check=True,
    )  # fmt: skip
    return done.stdout.decode()


def test_a_pipe_that_nobody_reads_holds_nobody_up() -> None:
    reading, writing = os.pipe()
    assert said("0.1", "5000", writing) == "went on"
    os.close(writing)
    log = b""
    while chunk := os.read(reading, 1 << 20):
        log += chunk
    os.close(reading)
    assert log.startswith(b"quantserve: line 0 ")


def test_a_full_disk_and_a_closed_pipe_are_no_end() -> None:
    with Path("/dev/full").open("wb") as full:
        assert said("60", "5", full.fileno()) == "went on"
    reading, writing = os.pipe()
    os.close(reading)
    assert said("60", "5", writing) == "went on"
    os.close(writing)


def test_lines_come_in_order_and_lost_ones_are_counted(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as sink:
        said("60", "5", sink.fileno())
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.split()[2] for line in lines] == ["0", "1", "2", "3", "4"]
