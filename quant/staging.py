"""The folder an artifact grows in: a hidden sibling of the target, renamed into place at the end.

A failure or Ctrl-C leaves nothing; a killed process leaves the hidden folder, which the next run
clears. Refuses a target that exists, unless told to replace an artifact.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from quant import artifact
from quant.errors import SourceError, SpaceError, TargetExists


def check_target(target: Path, *, force: bool) -> None:
    """TargetExists unless the target is free, empty, or an artifact to be replaced."""
    if not target.exists() and not target.is_symlink():
        return
    if target.is_mount():
        raise TargetExists(
            f"{target} is a mount point, which cannot be renamed; name a folder in it"
        )
    if target.is_dir() and not any(target.iterdir()):
        return
    if not force:
        raise TargetExists(f"{target} exists already; --force replaces an artifact")
    if not (target / artifact.MANIFEST).is_file():
        raise TargetExists(f"{target} is not an artifact of ours and is not replaced")


def check_space(folder: Path, needed: int) -> None:
    """SpaceError when the disk under `folder` has less than `needed` bytes left."""
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(nearest).free
    if free < needed:
        raise SpaceError(
            f"{folder} needs {needed / 1e6:,.0f} MB of disk, and {nearest} has {free / 1e6:,.0f} MB"
        )


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """An empty folder that becomes `target` on a clean exit, by one rename, and else is removed.

    Call `check_target` first: what stands at `target` at the end is replaced.
    """
    folder = target.with_name(f".{target.name}.partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as fault:
        raise SourceError(f"{folder} cannot be written: {fault.strerror}") from fault
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as fault:
            raise TargetExists(f"another process is writing {target} at this moment") from fault
        try:
            _empty(folder)
            yield folder
            (folder / ".lock").unlink()
            _publish(folder, target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _empty(folder: Path) -> None:
    """Clears what a killed run left."""
    for stale in folder.iterdir():
        if stale.name != ".lock":
            _remove(stale)


def _publish(folder: Path, target: Path) -> None:
    replaced = target.with_name(f".{target.name}.replaced")
    _remove(replaced)
    if target.exists():
        target.rename(replaced)
    folder.rename(target)
    with suppress(OSError):  # the new artifact stands; the next run clears what is left of the old
        _remove(replaced)


def _remove(path: Path) -> None:
    """Whatever stands there, if anything; of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
