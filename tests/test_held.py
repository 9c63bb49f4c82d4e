"""`make test ISA=...`: what a process held to a level may still use."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests import held

PROGRAM = """
import json, torch, numba, serve.isa
from quant.solver import devices
from serve import settings
print(json.dumps({
    "torch": torch.backends.cpu.get_cpu_capability(),
    "loops": numba.config.CPU_NAME,
    "blocks": str(devices.forward_dtype(torch.device("cpu"), exact=False)),
    "served": settings.load().max_cpu_isa,
    "asked": [torch.cpu._is_avx512_bf16_supported(), torch.cpu._is_amx_tile_supported()],
}))
"""


@pytest.mark.parametrize("level", ["avx2", "avx512"])
def test_a_level_holds_every_library(level: str) -> None:
    if held.lacking(level):
        pytest.skip(f"this processor has no {', '.join(held.lacking(level))}")
    env = {**os.environ, **held.environment(level)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told == {
        "torch": level.upper(),
        "loops": held.PROCESSORS[level],
        "blocks": "torch.float32",
        "served": level,
        "asked": [False, False],
    }


def test_an_unknown_level_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.held", "sse9"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "ISA=sse9: one of avx2, avx512\n"
