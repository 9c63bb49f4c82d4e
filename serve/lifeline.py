"""Ties a process to the one that started it, so that nothing of ours is left behind by a kill -9.

Linux only, as vLLM's CPU and CUDA builds are.
"""

from __future__ import annotations

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Have the kernel kill this process when process `parent`, which started it, ends in any way.

    Exits at once when that has ended already: the kernel tells only of what is still to come.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit(1)
