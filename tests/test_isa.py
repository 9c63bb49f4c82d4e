"""`serve.isa`: what a process may use of its CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FLAGS = Path("/proc/cpuinfo").read_text("utf-8").split()
# Linux's own word on whether a process may touch AMX's tiles (arch_prctl, XTILEDATA).
ASKED = """
import ctypes, serve.isa
allowed = ctypes.c_ulong()
ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(allowed))
print(allowed.value >> 18 & 1)
"""


@pytest.mark.skipif("amx_tile" not in FLAGS, reason="this CPU has no AMX")
@pytest.mark.parametrize(("level", "may"), [("auto", "1"), ("avx512", "0")])
def test_a_process_may_use_amx_before_anybody_multiplies(level: str, may: str) -> None:
    """vLLM's attention uses it without asking, and is then killed by an illegal instruction."""
    env = {**os.environ, "QUANTSERVE_MAX_CPU_ISA": level}
    done = subprocess.run(
        [sys.executable, "-c", ASKED], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == may
