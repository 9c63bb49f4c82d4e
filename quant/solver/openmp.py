"""The threads that OpenMP keeps for a thread of ours, given back: it keeps as many as there are
cores for every one that has computed something, for as long as that lives.

Elsewhere than in GCC's OpenMP, which torch brings for Linux, nothing happens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch  # whose OpenMP this is, loaded for all to see

_SOFT = 1  # of omp.h: what is given back is made again when it is needed


def _pause() -> Callable[[int], int]:
    found = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
    return found or (lambda _kind: 0)


_pause_all = _pause()


def give_back() -> None:
    """Ends the threads that were kept for this one, outside any parallel loop; the next loop makes
    them anew, in some tens of microseconds each."""
    if torch.get_num_threads() > 1:
        _pause_all(_SOFT)
