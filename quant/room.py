"""How much memory may still be taken: what the machine has left, and what a container allows.

Reads Linux's control groups, both versions; elsewhere the machine's free memory is all there is.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

_ROOT = Path("/")


def left(device: torch.device) -> int:
    """Bytes that may still be taken on the device; for the CPU as `of_host`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return of_host()


def of_host(root: Path = _ROOT) -> int:
    """Bytes that this process may still take: the least of the machine's and its groups'."""
    return min([psutil.virtual_memory().available, *_of_groups(root)])


def _of_groups(root: Path) -> Iterator[int]:
    """What each control group above this process leaves, where it has a limit."""
    table = root / "proc/self/cgroup"
    if not table.is_file():
        return
    for line in table.read_text("utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            names, home = ("memory.max", "memory.current", "inactive_file"), "sys/fs/cgroup"
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            home = "sys/fs/cgroup/memory"
        else:
            continue
        top = root / home
        inner = top / path.strip("/")
        for folder in (inner, *inner.parents):
            yield from _of_group(folder, *names)
            if folder == top:
                break


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
