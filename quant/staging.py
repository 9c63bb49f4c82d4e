"""Where an artifact grows: in a hidden sibling of the target, renamed into place at the end.

A failure leaves nothing, unless the run has done something that the next one can go on from: then
an interrupt, a full disk and a crash leave the hidden folder, as a killed process does. Refuses a
target that exists, unless told to replace an artifact.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from quant import artifact, durable, interrupt
from quant.durable import settle, settle_all
from quant.errors import QuantError, SourceError, SpaceError, TargetExists

_COMING = "coming"  # holds the number of the folder that is about to be the target


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


def check_space(folder: Path, needed: int) -> int:
    """Bytes left on the disk under `folder`; SpaceError when they are fewer than `needed`."""
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(nearest).free
    if free < needed:
        raise SpaceError(
            f"{folder} needs {needed / 1e6:,.0f} MB of disk, and {nearest} has {free / 1e6:,.0f} MB"
        )
    return free


@dataclass(slots=True)
class Stage:
    """`folder` becomes the target; `state` is what the next run needs to go on.

    Until `take`n it may hold another command's work, which a failure leaves alone. `promise` says
    what the next run will do; while there is one, what is done survives all but a refusal.
    """

    folder: Path
    state: Path
    taken: bool = False
    promise: str | None = None

    def take(self, *, anew: bool) -> None:
        """Makes the stage this run's own: `anew` empties it."""
        for place in (self.state, self.folder):  # a folder without state is nothing to go on from
            if anew:
                _discard(place)
            place.mkdir(parents=True, exist_ok=True)
        self.taken = True

    def bytes(self) -> int:
        """That lie in it already."""
        return sum(path.stat().st_size for path in self.folder.parent.rglob("*") if path.is_file())


@contextmanager
def resumable(target: Path) -> Iterator[Stage]:
    """A stage whose `folder` becomes `target` on a clean exit, by one rename.

    A failure that the next run can go on after leaves the stage, and carries its promise as a
    note; any other removes it. Call `check_target` first: what stands at `target` is replaced.
    """
    interrupt.check()
    home = target.with_name(f".{target.name}.partial")
    with _locked(home, target):
        _clear_published(home, target)
        stage = Stage(home / "artifact", home / "state")
        found = stage.state.exists()
        try:
            yield stage
            try:
                _publish(stage.folder, target)
            except OSError as fault:
                raise SpaceError(f"{target} cannot be put in place: {fault}") from fault
        except BaseException as fault:
            if stage.promise is not None and _may_go_on_after(fault):
                fault.add_note(stage.promise)
            elif stage.taken or not found:
                shutil.rmtree(home, ignore_errors=True)
            raise
        shutil.rmtree(home, ignore_errors=True)


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """An empty folder that becomes `target` on a clean exit, by one rename, and else is removed.

    Call `check_target` first: what stands at `target` at the end is replaced.
    """
    with resumable(target) as stage:
        stage.take(anew=True)
        yield stage.folder


@contextmanager
def _locked(home: Path, target: Path) -> Iterator[None]:
    """Makes `home` and holds it: one process at a time writes a target."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = (home / ".lock").open("w")
    except OSError as fault:
        raise SourceError(f"{home} cannot be written: {fault.strerror}") from fault
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as fault:
            raise TargetExists(f"another process is writing {target} at this moment") from fault
        yield


def _may_go_on_after(fault: BaseException) -> bool:
    """Not after a refusal, which would only come again."""
    return isinstance(fault, SpaceError) or not isinstance(fault, QuantError)


def _publish(folder: Path, target: Path) -> None:
    """One rename of what is on the disk for good; what stood at `target` is then in its place."""
    settle_all(folder)
    replaced = target.with_name(f".{target.name}.replaced")
    _remove(replaced)
    if not os.path.lexists(target):
        folder.rename(target)
    else:
        durable.replace(folder.with_name(_COMING), str(folder.stat().st_ino))
        if not durable.exchange(folder, target):
            target.rename(replaced)  # there is no target until the next line
            folder.rename(target)
    settle(folder.parent)
    settle(target.parent)
    with suppress(OSError):  # the new artifact stands; the next run clears what is left of the old
        _remove(replaced)


def _clear_published(home: Path, target: Path) -> None:
    """What a run left that was killed behind its exchange is the artifact of before, and a state
    that would take it for its own."""
    coming = home / _COMING
    if not coming.is_file() or not os.path.lexists(target):
        return
    if coming.read_text("utf-8") == str(target.lstat().st_ino):
        for place in (home / "state", home / "artifact", coming):
            _remove(place)


def _discard(folder: Path) -> None:
    """Gone at once, not file by file: what is left of a state is never taken for one."""
    stale = folder.with_name("stale")
    _remove(stale)
    if folder.exists():
        folder.rename(stale)
        _remove(stale)


def _remove(path: Path) -> None:
    """Whatever stands there, if anything; of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
