"""What a power cut would leave: which files and folders lay on the disk when they got their names.

An audit hook sees each rename before it is made; what was synced is known by inode, size and time
of the last change, so that a write behind the sync counts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_WATCHING: list[Disk] = []
_HOOKED: list[bool] = []


class Disk:
    """Watches this process for as long as the test runs."""

    def __init__(self, patch: pytest.MonkeyPatch, home: Path) -> None:
        self.home = home
        self.named: list[str] = []  # what was renamed to a name that is not hidden
        self.unsafe: list[str] = []  # what was not on the disk then
        self.unsettled: set[int] = set()  # folders whose new names are not on the disk yet
        self._synced: set[tuple[int, int, int]] = set()
        self._fsync = os.fsync
        patch.setattr(os, "fsync", self._sync)
        if not _HOOKED:
            sys.addaudithook(_hook)  # which nothing takes away again
            _HOOKED.append(True)
        _WATCHING.append(self)

    def holds(self, path: Path) -> bool:
        return _state(path.lstat()) in self._synced

    def renaming(self, source: Path, target: Path) -> None:
        if target.name.startswith((".", "stale")) or not source.is_relative_to(self.home):
            return
        self.named.append(target.name)
        self.unsettled.add(target.parent.stat().st_ino)
        inside = source.rglob("*") if source.is_dir() else iter(())
        lacking = [path for path in (source, *inside) if not self.holds(path)]
        self.unsafe += [path.relative_to(self.home).as_posix() for path in lacking]

    def _sync(self, number: int) -> None:
        self._fsync(number)
        about = os.fstat(number)
        self._synced.add(_state(about))
        self.unsettled.discard(about.st_ino)


def _state(about: os.stat_result) -> tuple[int, int, int]:
    return about.st_ino, about.st_size, about.st_mtime_ns


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if event == "os.rename" and _WATCHING:
        _WATCHING[-1].renaming(Path(os.fsdecode(args[0])), Path(os.fsdecode(args[1])))


def watched(patch: pytest.MonkeyPatch, home: Path) -> Iterator[Disk]:
    """For a fixture: renames under `home`."""
    disk = Disk(patch, home)
    yield disk
    _WATCHING.remove(disk)
