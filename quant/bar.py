"""What a long command shows: a bar on stderr for people, or JSON lines on stdout for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from quant.artifact import LayerReport


class Bar:
    """Layer and loss, or what is measured; how far; time left."""

    def __init__(self, task: str) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task(task, total=1)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress.live.is_started:  # else stopping would print an empty line
            self._progress.stop()

    def say(self, line: str) -> None:
        self._console.print(f"quantserve: {line}", markup=False, soft_wrap=True)

    def foreseen(self, line: str, _facts: Mapping[str, float]) -> None:
        self.say(line)

    def solved(self, report: LayerReport, done: int, total: int) -> None:
        self.measured(f"{report.name}  loss {report.loss:.2e}", done, total)

    def measured(self, name: str, done: int, total: int) -> None:
        self._progress.start()
        self._progress.update(self._task, description=escape(name), completed=done, total=total)


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
