"""How much memory may still be taken, how many cores used and threads started: what the machine
has left, and what a container or a limit of the user's allows.

Reads Linux's control groups, both versions; elsewhere what the machine has is all there is. Needs
no torch.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

_ROOT = Path("/")
_MOST_THREADS = 1 << 22  # Linux numbers no more


def of_host(root: Path = _ROOT) -> int:
    """Bytes that this process may still take: the least of the machine's and its groups'."""
    return min([psutil.virtual_memory().available, *_of_groups(root)])


def of_threads(root: Path = _ROOT) -> int:
    """Threads that this process may still start, by the control groups above it and by the limit of
    its user's, which does not hold for root."""
    left = [_MOST_THREADS, *_of_user(root)]
    for folder, _ in _groups(root, "pids"):
        allowed = _read(folder / "pids.max")
        if allowed not in (None, "max"):
            left.append(max(int(allowed) - int(_read(folder / "pids.current") or 0), 0))
    return min(left)


def _of_user(root: Path) -> Iterator[int]:
    """What RLIMIT_NPROC leaves: it counts the threads of all processes of a user."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if limit != resource.RLIM_INFINITY and os.geteuid() != 0:
        tables = (_status(each) for each in (root / "proc").glob("[0-9]*/status"))
        own = f"{os.getuid()}"
        used = (int(t["Threads"]) for t in tables if t.get("Uid", "").split()[:1] == [own])
        yield max(limit - sum(used), 0)


def _status(path: Path) -> dict[str, str]:
    """Empty of a process that has ended."""
    with suppress(OSError):
        lines = (line.partition(":") for line in path.read_text("utf-8", "replace").splitlines())
        return {name: value.strip() for name, _, value in lines}
    return {}


def of_cores(root: Path = _ROOT) -> float:
    """Cores' worth of time that this process may use, by its affinity and its groups' quotas."""
    allowed = [float(len(os.sched_getaffinity(0)))]
    for folder, is_old in _groups(root, "cpu"):
        if is_old:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            told = [_read(folder / name) or "-1" for name in names]
        else:
            told = (_read(folder / "cpu.max") or "max 1").split()
        quota, period = told
        if quota not in ("max", "-1"):
            allowed.append(int(quota) / int(period))
    return min(allowed)


def _of_groups(root: Path) -> Iterator[int]:
    """Bytes that each control group above this process leaves, where it has a limit."""
    for folder, is_old in _groups(root, "memory"):
        if is_old:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            names = ("memory.max", "memory.current", "inactive_file")
        yield from _of_group(folder, *names)


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """Folders of the control groups above this process, and whether they are of version 1."""
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        inner = top / path.strip("/")
        for folder in (inner, *inner.parents):
            yield folder, bool(controllers)
            if folder == top:
                break


def _read(path: Path) -> str | None:
    return path.read_text("utf-8").strip() if path.is_file() else None


def _of_group(folder: Path, limit: str, used: str, cache: str) -> Iterator[int]:
    """Bytes that a group leaves; the cache of files that nobody uses is given back on demand."""
    if not (folder / limit).is_file():  # the path is another namespace's, or the root has none
        return
    allowed = (folder / limit).read_text("ascii").strip()
    if allowed == "max":
        return
    table = dict(line.split() for line in (folder / "memory.stat").read_text("ascii").splitlines())
    taken = int((folder / used).read_text("ascii")) - int(table[cache])
    yield max(int(allowed) - taken, 0)
