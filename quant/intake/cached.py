"""Folders that are made once and kept: whole under their name, or not there at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from quant.durable import settle, settle_all
from quant.errors import SourceError, SpaceError


def hidden(target: Path) -> Path:
    """An empty folder beside `target`, which is made where it may stand. SourceError."""
    home = target.parent
    try:
        home.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=home, prefix=f".{target.name}."))
    except OSError as fault:
        raise SourceError(f"{home} cannot be written: {fault.strerror}") from fault


def folder(target: Path, make: Callable[[Path], None]) -> Path:
    """`target`; if it is not there, `make` fills a hidden sibling that is renamed to it.

    SourceError where the cache cannot be written, SpaceError where it cannot hold the content.
    """
    if target.is_dir():
        return target
    home = target.parent
    growing = hidden(target)
    try:
        make(growing)
        growing.chmod(0o755)
        settle_all(growing)
        if not target.is_dir():  # else another process was faster, and its folder is as good
            growing.rename(target)
            settle(home)
    except OSError as fault:
        if not target.is_dir():
            raise SpaceError(f"{home} cannot hold the model: {fault}") from fault
    finally:
        shutil.rmtree(growing, ignore_errors=True)
    return target
