"""Files and renames on the disk for good. Standard library only."""

import ctypes
import errno
import os
import sys
from pathlib import Path

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE


def settle(path: Path) -> None:
    """Brings a file to disk, or what was made and renamed in a folder."""
    place = os.open(path, os.O_RDONLY)
    try:
        os.fsync(place)
    except OSError as fault:
        if fault.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network disks sync no folders
            raise
    finally:
        os.close(place)


def replace(path: Path, text: str) -> None:
    """The file holds this text, in UTF-8, or what it held before; OSError where it cannot."""
    growing = path.with_name(f".{path.name}.partial")
    growing.write_text(text, "utf-8")
    settle(growing)
    growing.replace(path)
    settle(path.parent)


def exchange(one: Path, other: Path) -> bool:
    """Each takes the other's name in one step; False where that cannot be done, and nothing was.

    https://man7.org/linux/man-pages/man2/rename.2.html, RENAME_EXCHANGE: some file systems refuse.
    """
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    sys.audit("os.rename", str(one), str(other), -1, -1)
    done: int = renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE)
    return done == 0


def settle_all(folder: Path) -> None:
    """Brings a new folder to disk, the files in it first; of a link its name, as of all others."""
    for inner in sorted(folder.rglob("*"), reverse=True):
        if not inner.is_symlink() and (inner.is_file() or inner.is_dir()):
            settle(inner)
    settle(folder)
