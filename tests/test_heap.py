"""`solver.heap`: what was freed in between leaves the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BEGIN = """
import psutil, torch
from quant.solver import heap
heap.share()
held = [torch.ones(25_000) for _ in range(2_000)]  # 100 kB each: none has pages of its own
resident = psutil.Process().memory_info
"""
HOLES = """
full = resident().rss
del held[::2]
holes = resident().rss
heap.give_back()
print(full, holes, resident().rss)
"""
GROWTH = """
heap.give_back()
del held[::2]
holes = resident().rss
heap.keep_low(100_000_000)
kept = resident().rss
more = torch.ones(50_000_000)
grown = resident().rss
heap.keep_low(100_000_000)
print(holes, kept, grown, resident().rss)
"""


def measured(code: str) -> list[int]:
    """Bytes that a process of its own tells."""
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def test_holes_between_what_is_held_go_back_to_the_system() -> None:
    full, holes, after = measured(HOLES)
    assert holes > full - 20e6, "freeing alone gives them back here: nothing to test"
    assert after < full - 60e6


def test_holes_stay_until_the_process_has_grown() -> None:
    holes, kept, grown, after = measured(GROWTH)
    assert kept > holes - 20e6
    assert after < grown - 60e6
