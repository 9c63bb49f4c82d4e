"""`solver.heap`: what was freed in between leaves the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HOLES = """
import psutil, torch
from quant.solver import heap
heap.share()
held = [torch.ones(25_000) for _ in range(2_000)]  # 100 kB each: none has pages of its own
resident = psutil.Process().memory_info
full = resident().rss
del held[::2]
holes = resident().rss
heap.give_back()
print(full, holes, resident().rss)
"""


def test_holes_between_what_is_held_go_back_to_the_system() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOLES],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    full, holes, after = map(int, done.stdout.split())
    assert holes > full - 20e6, "freeing alone gives them back here: nothing to test"
    assert after < full - 60e6, done.stderr
