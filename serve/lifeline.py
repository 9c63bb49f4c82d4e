"""Ties a process to the one that started it, so that nothing of ours is left behind by a kill -9;
buries what ended and has nobody else to see to it.

Linux only, as vLLM's CPU and CUDA builds are.
"""

from __future__ import annotations

import ctypes
import os
import signal
from contextlib import suppress

PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Have the kernel kill this process when process `parent`, which started it, ends in any way.

    Exits at once when that has ended already: the kernel tells only of what is still to come.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit(1)


def bury_orphans(own: int) -> None:
    """Reap children that were left to this process by others, as they are to a container's PID 1.

    Child `own`, which this process started and waits for itself, is left alone (0: none).
    """
    with suppress(ChildProcessError):
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid == own:
                return  # told again until it is waited for; what is behind it comes next time
            os.waitpid(ended.si_pid, os.WNOHANG)
