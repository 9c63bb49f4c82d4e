"""The tests that depend on arithmetic, on this machine as on an older one.

    python -m tests.held avx2 [PYTEST'S WORDS]      # as without AVX-512
    python -m tests.held avx512 [PYTEST'S WORDS]    # AVX-512 and VNNI, without bf16 and AMX

Whatever computes here reads its limit from the environment when it is loaded, so this runs pytest
as a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from serve.settings import CPU_LIMITS

# The solver's compiled loops, by the oldest processor of each level.
PROCESSORS = {"avx2": "haswell", "avx512": "cascadelake"}


def environment(level: str) -> dict[str, str]:
    """What holds torch, oneDNN, MKL, numba and our server to a level."""
    loops = {"NUMBA_CPU_NAME": PROCESSORS[level], "NUMBA_CPU_FEATURES": ""}
    return {**CPU_LIMITS[level], **loops, "QUANTSERVE_MAX_CPU_ISA": level}


def lacking(level: str) -> list[str]:
    """Instructions of a level that this processor does not have."""
    needed = {"avx2": ["avx2"], "avx512": ["avx2", "avx512_f", "avx512_vnni"]}[level]
    has = torch.cpu.get_capabilities()
    return [name for name in needed if not has.get(name)]


def main() -> None:
    level, *words = sys.argv[1:] or [""]
    if level not in CPU_LIMITS:
        sys.exit(f"ISA={level}: one of {', '.join(CPU_LIMITS)}")
    if missing := lacking(level):
        sys.stdout.write(f"ISA={level}: skipped, this processor has no {', '.join(missing)}\n")
        return
    # Before anything asks torch: vLLM picks its C++ extension on import.
    pytest = [sys.executable, "-m", "pytest", "-p", "serve.isa", *words]
    env = {**os.environ, **environment(level)}
    units = [*pytest, "-m", "arithmetic and not e2e", "-n", "2", "--dist", "loadfile"]
    if status := subprocess.run(
        units, env=env | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}, check=False
    ).returncode:
        sys.exit(status)
    os.execve(sys.executable, [*pytest, "-m", "arithmetic and e2e"], env)


if __name__ == "__main__":
    main()
