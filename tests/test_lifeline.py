"""A process dies with the one that started it, however that ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent

CHILD = "import os, sys, time; from serve import lifeline; lifeline.die_with(int(sys.argv[1])); "
PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())], stdout=sys.stdout)
time.sleep(600)
"""


def test_a_child_does_not_outlive_a_parent_that_was_killed() -> None:
    code = CHILD + "print(os.getpid(), flush=True); time.sleep(600)"
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, code], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        child.wait(30)
    assert not child.is_running()


def test_a_child_that_comes_too_late_to_be_told_ends_by_itself() -> None:
    somebody_else = os.getppid()
    code = CHILD + "time.sleep(600)"
    ended = subprocess.run([sys.executable, "-c", code, str(somebody_else)], timeout=300)
    assert ended.returncode == 1


FORKING = """
import multiprocessing, os, time
from serve import forkserver, lifeline

def engine():
    lifeline.die_with(os.getppid())
    print(os.getpid(), os.getppid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    multiprocessing.set_forkserver_preload(forkserver.ENGINE_MODULES[:1])
    multiprocessing.get_context("forkserver").Process(target=engine).start()
    time.sleep(600)
"""


def test_a_forked_engine_and_its_fork_server_do_not_outlive_a_killed_worker(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(FORKING)
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as worker:
        assert worker.stdout is not None
        pids = map(int, worker.stdout.readline().split())
        left = [psutil.Process(pid) for pid in pids]
        worker.kill()
        _, alive = psutil.wait_procs(left, timeout=300)
        for process in alive:
            process.kill()
    assert not alive
