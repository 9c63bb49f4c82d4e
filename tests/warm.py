"""The console script in a fresh process that has torch imported already.

A cold run spends seconds on imports. Here a fork server has them, and each run is a fork of it
that executes the very script beside the interpreter: its own argv, files, signals and exit status.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

QUANTSERVE = str(Path(sys.executable).with_name("quantserve"))
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["quant.pipeline", "tests.warm", "tests.dying"])


@dataclass(frozen=True)
class Running:
    """A run that was begun; what it says grows in two files of `said`."""

    process: ForkServerProcess
    said: Path

    @property
    def stdout(self) -> str:
        path = self.said / "stdout"
        return path.read_text() if path.exists() else ""

    @property
    def stderr(self) -> str:
        return (self.said / "stderr").read_text()

    def status(self) -> int:
        """Waits; the exit status, or minus the number of the signal that ended it."""
        self.process.join(timeout=300)
        assert self.process.exitcode is not None, "still running after two minutes"
        return self.process.exitcode


def begin(
    *words: str,
    said: Path,
    largest_file: int | None = None,
    first: Callable[[], None] | None = None,
) -> Running:
    """`quantserve WORDS`; writes beyond `largest_file` bytes fail as on a full disk.

    `first` is called in the new process before the script.
    """
    said.mkdir(parents=True)
    process = _FORKS.Process(target=_script, args=(words, said, largest_file, first))
    process.start()
    return Running(process, said)


def _script(
    words: tuple[str, ...],
    said: Path,
    largest_file: int | None,
    first: Callable[[], None] | None,
) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(said / name, os.O_CREAT | os.O_WRONLY), number)
    if largest_file is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, hard))
    if first is not None:
        first()
    sys.argv = [QUANTSERVE, *words]
    runpy.run_path(QUANTSERVE, run_name="__main__")
