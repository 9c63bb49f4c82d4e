"""What a long command shows: a bar on stderr for people, or JSON lines on stdout for programs.

Without a terminal the bar is a line for each tenth of the work. Tables are plain text, as wide as
they are: a pipe gets no padding, and nothing is cut.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from quant.artifact import LayerReport

_TENTHS = 10
_CELLS = 30  # of a terminal's line, for the count and the times
_BAR_CELLS = 40  # which go to the name first, then to the bar


class Bar:
    """Layer and loss, or what is measured; how far; time left.

    In a narrow terminal the bar goes first, then the front of the name; how far and the times stay.
    """

    def __init__(self, task: str) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bar = BarColumn(bar_width=None)
        self._progress = Progress(
            TextColumn("{task.description}"),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            expand=True,
        )
        self._task = self._progress.add_task(task, total=1)
        self._began, self._tenth = time.monotonic(), 0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress.live.is_started:  # else stopping would print an empty line
            self._progress.stop()

    def say(self, line: str) -> None:
        self._console.print(f"quantserve: {line}", markup=False, soft_wrap=True)
        if self._tenth == 0 and not self._progress.live.is_started:
            self._began = time.monotonic()  # what comes next has taken no time yet
            self._progress.reset(self._task, total=1)

    def foreseen(self, line: str, _facts: Mapping[str, float]) -> None:
        self.say(line)

    def solved(self, report: LayerReport, done: int, total: int) -> None:
        self.measured(f"{report.name}  loss {report.loss:.2e}", done, total)

    def measured(self, name: str, done: int, total: int) -> None:
        if not self._console.is_terminal:
            self._tell(name, done, total)
            return
        spare = self._console.width - _CELLS
        has_bar = spare - len(name) > _BAR_CELLS // 2
        columns = [each for each in self._progress.columns if each is not self._bar]
        self._progress.columns = (columns[0], *[self._bar] * has_bar, *columns[1:])
        if len(name) > spare:
            name = "…" + name[len(name) - max(spare, 2) + 1 :]
        self._progress.start()
        self._progress.update(self._task, description=escape(name), completed=done, total=total)

    def _tell(self, name: str, done: int, total: int) -> None:
        """A line where another tenth is done."""
        tenth, spent = done * _TENTHS // max(total, 1), time.monotonic() - self._began
        if tenth > self._tenth:
            left = f", about {_clock(spent * (total - done) / done)} left" if done < total else ""
            self._tenth = tenth  # before it is said: the clock begins with what is said before
            self.say(f"{done}/{total} in {_clock(spent)}{left}: {name}")
        if done >= total:  # another round may follow
            self._tenth, self._began = 0, time.monotonic()


class Lines:
    """The same as JSON lines, for machines."""

    def say(self, line: str) -> None:
        write({"event": "stage", "message": line})

    def foreseen(self, line: str, facts: Mapping[str, float]) -> None:
        write({"event": "estimate", "message": line, **facts})

    def solved(self, report: LayerReport, done: int, total: int) -> None:
        write({"event": "layer", "done": done, "total": total} | report.model_dump())

    def measured(self, name: str, done: int, total: int) -> None:
        write({"event": "measured", "done": done, "total": total, "name": name})


def write(value: dict[str, Any]) -> None:
    """One JSON line on stdout, at once."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def table(rows: Iterable[Sequence[str]], *, figures: bool = False) -> str:
    """Lines of columns, each as wide as it has to be; `figures` stand right behind the first."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    later = str.rjust if figures else str.ljust
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *map(later, rest, widths[1:])]
        lines.append("  ".join(cells).rstrip() + "\n")
    return "".join(lines)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
