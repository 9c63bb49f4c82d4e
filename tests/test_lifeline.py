"""A process dies with the one that started it, however that ends."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil

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
    ended = subprocess.run([sys.executable, "-c", code, str(somebody_else)], timeout=60)
    assert ended.returncode == 1
