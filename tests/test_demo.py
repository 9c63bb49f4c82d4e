"""`make demo` while it is stopped: one line of its own, status 2, and nothing left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.test_interrupt import until_it_listens

COMMAND = """\
#!/bin/sh
trap 'echo "quantserve: interrupted; nothing was written" >&2; exit 2' INT TERM
echo $$ > {home}/started
while :; do sleep 0.05; done
"""
PROGRAM = "import sys; from bench import demo; demo.QUANTSERVE = sys.argv.pop(1); demo.main()"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_command_that_runs_and_both_say_a_line(
    number: signal.Signals, tmp_path: Path
) -> None:
    with quantizing(tmp_path) as demo:
        demo.send_signal(number)
        _, err = demo.communicate(timeout=300)
    assert demo.returncode == 2
    assert err.splitlines() == [
        "quantserve: interrupted; nothing was written",
        "demo: interrupted; the next run keeps what is in the folder",
    ]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "started").read_text()), 0)


def test_a_demo_that_is_killed_takes_its_command_along(tmp_path: Path) -> None:
    """So does a second signal, which ends it on the spot."""
    with quantizing(tmp_path) as demo:
        command = psutil.Process(int((tmp_path / "started").read_text()))
        demo.kill()
        assert not psutil.wait_procs([command], timeout=300)[1]


@contextmanager
def quantizing(home: Path) -> Iterator[subprocess.Popen[str]]:
    """A demo whose command has begun."""
    (home / "pirate").mkdir()  # trained already
    command = home / "quantserve"
    command.write_text(COMMAND.format(home=home))
    command.chmod(0o755)
    words = [sys.executable, "-c", PROGRAM, str(command), "--folder", str(home)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        end = time.monotonic() + 300
        while not (home / "started").exists() or not (home / "started").read_text():
            assert demo.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        yield demo


def test_a_signal_while_it_trains_is_one_line(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "bench.demo", "--folder", str(tmp_path / "demo")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        until_it_listens(demo.pid)
        assert demo.stdout is not None
        while "1. A trainer's output" not in demo.stdout.readline():
            assert demo.poll() is None
        demo.send_signal(signal.SIGTERM)
        _, err = demo.communicate(timeout=300)
    assert demo.returncode == 2 and err.count("\n") == 1, err
    assert err.startswith("demo: interrupted; ")
    assert not (tmp_path / "demo" / "pirate").exists()
