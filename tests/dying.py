"""Ways for a process to end, be stopped, or find the disk full, at a chosen step on files.

An audit hook sees every file under a folder that is opened, renamed or removed. Light to import:
the process that is to die has to.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

WATCHED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def watched(folder: Path, act: Callable[[str, str], object]) -> None:
    """Calls `act` before each step of this process on a file under `folder`: event and path."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in WATCHED and str(args[0]).startswith(str(folder)):
            act(event, str(args[0]))

    sys.addaudithook(hook)


def die_at(folder: Path, moment: tuple[str, str]) -> None:
    def act(event: str, path: str) -> None:
        if event == moment[0] and path.endswith(moment[1]):
            os.kill(os.getpid(), signal.SIGKILL)

    watched(folder, act)


def signal_at(folder: Path, moment: tuple[str, str], numbers: Sequence[signal.Signals]) -> None:
    """Signals to itself, once, at such a step."""
    left = list(numbers)

    def act(event: str, path: str) -> None:
        if event == moment[0] and path.endswith(moment[1]):
            while left:
                os.kill(os.getpid(), left.pop(0))

    watched(folder, act)


def die_writing(folder: Path, file: str, after: int) -> None:
    """The kernel ends the process `after` bytes into the file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    fill_disk(folder, file, after)


def fill_disk(folder: Path, file: str, after: int) -> None:
    """No file can grow beyond `after` bytes from when this one is opened."""

    def act(event: str, path: str) -> None:
        if event == "open" and path.endswith(file):
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (after, hard))

    watched(folder, act)


def note_steps(folder: Path, file: Path) -> None:
    out = os.open(file, os.O_CREAT | os.O_WRONLY)
    watched(folder, lambda event, path: os.write(out, f"{event} {path}\n".encode()))


def die_at_step(folder: Path, number: int) -> None:
    left = iter(range(number))

    def act(_event: str, _path: str) -> None:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    watched(folder, act)
