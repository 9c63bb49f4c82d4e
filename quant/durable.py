"""Files and renames on the disk for good. Standard library only."""

import errno
import os
from pathlib import Path


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


def settle_all(folder: Path) -> None:
    """Brings a new folder to disk, the files in it first."""
    for inner in sorted(folder.rglob("*"), reverse=True):
        if inner.is_file() or inner.is_dir():
            settle(inner)
    settle(folder)
