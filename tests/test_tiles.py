"""`solver.tiles`: what `tests/test_columns.py` asks of all loops, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRITON = ROOT / ".cache/triton"


def test_the_loops_for_a_gpu_do_what_the_compiled_ones_do() -> None:
    if not TRITON.is_dir():
        pytest.skip("no Triton: tests/setup-triton.sh installs it")
    paths = os.pathsep.join([str(ROOT), str(TRITON)])
    quiet = "ignore:Conversion of an array:DeprecationWarning"  # in the interpreter
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", quiet, "tests/test_columns.py", "-k", "tiles"],
        env=os.environ | {"PYTHONPATH": paths, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout
    assert " passed" in run.stdout and "skipped" not in run.stdout
