"""`quant.room`: free memory as the machine and the groups above the process have it."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import psutil
import pytest

from quant import room

GB = 10**9


def group(folder: Path, limit: str, used: int, cache: int) -> None:
    """A control group of version 2 as the kernel shows it."""
    folder.mkdir(parents=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\nfile 2\ninactive_file {cache}\n")


def old_group(folder: Path, limit: int, used: int, cache: int) -> None:
    """The same of version 1."""
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"cache 1\ntotal_inactive_file {cache}\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    return tmp_path


def test_without_groups_the_machine_decides(root: Path) -> None:
    free = psutil.virtual_memory().available
    assert room.of_host(root) == pytest.approx(free, rel=0.2)
    (root / "proc/self/cgroup").write_text("0::/\n")  # the root group has no limit file
    assert room.of_host(root) == pytest.approx(free, rel=0.2)


def test_the_tightest_of_all_groups_decides(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("0::/user/job\n")
    top = root / "sys/fs/cgroup"
    group(top / "user/job", "max", used=9, cache=0)
    for place, limit in ((top / "user", 3000), (top, 9000)):
        (place / "memory.max").write_text(f"{limit}\n")
        (place / "memory.current").write_text("1000\n")
        (place / "memory.stat").write_text("inactive_file 200\n")
    assert room.of_host(root) == 3000 - (1000 - 200)


def test_a_container_sees_its_own_group_at_the_top(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("0::/../../elsewhere\n")
    group(root / "sys/fs/cgroup", "5000", used=6000, cache=500)
    assert room.of_host(root) == 0  # it is over its limit, not below nothing


def test_the_older_groups_are_read_too(root: Path) -> None:
    table = "11:cpu,cpuacct:/x\n4:memory:/jobs/one\n0::/\n"
    (root / "proc/self/cgroup").write_text(table)
    old_group(root / "sys/fs/cgroup/memory/jobs/one", 7000, used=4000, cache=1000)
    assert room.of_host(root) == 4000


def process(root: Path, number: int, user: int, threads: int) -> None:
    folder = root / "proc" / str(number)
    folder.mkdir(parents=True)
    (folder / "status").write_text(f"Name:\tx\nUid:\t{user}\t0\t0\t0\nThreads:\t{threads}\n")


@pytest.mark.parametrize(("user", "left"), [(1000, 100 - 7), (1001, 100 - 4), (0, 1 << 22)])
def test_a_users_limit_counts_the_threads_of_all_processes(
    root: Path, monkeypatch: pytest.MonkeyPatch, user: int, left: int
) -> None:
    """But root's."""
    for number, (owner, threads) in enumerate([(1000, 5), (1000, 2), (1001, 4), (0, 9)], 10):
        process(root, number, owner, threads)
    monkeypatch.setattr(os, "getuid", lambda: user)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (100, 100))
    assert room.of_threads(root) == left


@pytest.mark.parametrize(
    ("table", "files"),
    [
        ("0::/job\n", {"job/cpu.max": "50000 100000\n", "cpu.max": "max 100000\n"}),
        (
            "3:cpu,cpuacct:/job\n",
            {"cpu/job/cpu.cfs_quota_us": "50000\n",
             "cpu/job/cpu.cfs_period_us": "100000\n",
             "cpu/cpu.cfs_quota_us": "-1\n"},
        ),
    ],
    ids=["groups", "older"],
)  # fmt: skip
def test_a_quota_counts_as_so_many_cores(root: Path, table: str, files: dict[str, str]) -> None:
    assert room.of_cores(root) == len(os.sched_getaffinity(0))
    (root / "proc/self/cgroup").write_text(table)
    for name, text in files.items():
        (root / "sys/fs/cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "sys/fs/cgroup" / name).write_text(text)
    assert room.of_cores(root) == 0.5
