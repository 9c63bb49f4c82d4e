"""Files that an operator names: read within bounds, never waited for without end."""

from __future__ import annotations

import os
import select
import stat
from collections.abc import Callable
from pathlib import Path

from serve.errors import SettingsError

PIPE_S = 5.0  # of silence in a pipe, such as a shell makes of `<(command)`
_PIECE = 1 << 16


def content(
    path: Path, most: int, check: Callable[[os.stat_result], None] = lambda _found: None
) -> bytes:
    """The first `most` bytes of a file or a pipe; `check` sees what it is before it is read.

    SettingsError for a pipe that nobody writes into; OSError.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb", buffering=0) as file:
        found = os.fstat(fd)
        check(found)
        read = b""
        while len(read) < most:
            if not stat.S_ISREG(found.st_mode) and not select.select([fd], [], [], PIPE_S)[0]:
                raise SettingsError(f"{path} is a pipe or a device that nobody writes into")
            piece = file.read(min(_PIECE, most - len(read)))
            if not piece:
                break
            read += piece
    return read


def check_plain(path: Path | None) -> None:
    """SettingsError for what is there and no file: it would be opened by path, and waited for."""
    if path is not None and path.exists() and not path.is_file():
        raise SettingsError(f"{path} is a folder, a pipe or a device; a file is expected")
