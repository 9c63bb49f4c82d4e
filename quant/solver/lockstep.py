"""One forward over many batches in step: every batch stops before the same layer.

A solver needs a layer's inputs from all batches before it can choose the weights that any of
them goes on with. Each batch runs its forward on a thread of its own and hands control back at
every stop; exactly one thread runs at a time, so each matrix product is computed once and only
what the stopped forwards hold is kept. A thread that stops gives its OpenMP workers back, so that
there are never more threads than lanes and cores. Refuses batches that do not stop at the same
places.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from quant.solver import openmp

_here = threading.local()
# cuDNN's would be planned anew in every thread, tens of milliseconds a lane.
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class _Abandoned(Exception):
    """Unwinds a stopped forward that nobody will resume."""


Shown = TypeVar("Shown")


class Lane(Generic[Shown]):
    """One batch's forward. `waiting` is what it stopped with; None once it has ended."""

    def __init__(self, pool: ThreadPoolExecutor, forward: Callable[[], Tensor]) -> None:
        self.waiting: Shown | None = None
        self._returned: list[Tensor] = []  # not in the future, which would hold it for ever
        # Not semaphores: Ctrl-C inside one's release can leave a waiter that is never woken again.
        self._go: SimpleQueue[None] = SimpleQueue()
        self._halted: SimpleQueue[None] = SimpleQueue()
        self._abandoned = False
        self._future = pool.submit(self._run, forward)
        self._future.add_done_callback(lambda _: self._halted.put(None))

    def advance(self) -> None:
        """Runs to the next stop or to the end; raises what the forward raised."""
        self.waiting = None
        self._go.put(None)
        self._halted.get()
        if self._future.done():
            self._future.result()

    def result(self) -> Tensor:
        """What the forward returned, once; it must have ended."""
        assert self._returned, "the forward stopped more often than expected"
        return self._returned.pop()

    def close(self) -> None:
        """Ends the forward wherever it is, and waits for it."""
        self._abandoned = True
        self._go.put(None)
        self._future.exception()

    def _run(self, forward: Callable[[], Tensor]) -> None:
        self._wait()
        _here.lane = self
        with torch.no_grad():  # the mode is per thread
            self._returned.append(forward())
        openmp.give_back()  # the thread waits for the other lanes' ends

    def _stop(self, shown: Shown) -> None:
        self.waiting = shown
        openmp.give_back()
        self._halted.put(None)
        self._wait()

    def _wait(self) -> None:
        self._go.get()
        if self._abandoned:
            raise _Abandoned


def stop(shown: object) -> None:
    """Called inside a lane's forward: shows what it was given and waits to be resumed."""
    lane: Lane[object] = _here.lane
    lane._stop(shown)


@contextmanager
def lanes(forwards: Sequence[Callable[[], Tensor]]) -> Iterator[list[Lane[Any]]]:
    """A lane for each forward, none started; whatever happens, none outlives the block."""
    threads = ThreadPoolExecutor(len(forwards), thread_name_prefix="lane")
    with sdpa_kernel(_ATTENTION), threads as pool:
        started: list[Lane[Any]] = []
        try:  # from the first lane on: one that nobody closes waits for ever
            for forward in forwards:
                started.append(Lane(pool, forward))
            yield started
        finally:
            for lane in started:
                lane.close()
