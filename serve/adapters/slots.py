"""How many different adapters the engine is asked for at once, and who waits for a place.

vLLM computes a batch with at most `count` adapters. It does not count pinned ones among them, so
more would leave one without a place in the middle of a step, which ends the engine; and it prefers
requests of adapters that run already, so that another's could wait for ever. Both are decided here,
before a request reaches it: pinned adapters keep their places, others share the rest in order of
arrival, and newcomers of a running adapter stand aside once somebody has waited for PATIENCE_S.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from serve.errors import AdapterSlotsFull

PATIENCE_S = 2.0


@dataclass(slots=True, eq=False)
class _Waiter:
    adapter: Hashable
    called: asyncio.Event = field(default_factory=asyncio.Event)
    since: float = field(default_factory=time.monotonic)


class Slots:
    """Places in a batch. Lives in the event loop's thread."""

    def __init__(self, count: int, wait_s: float) -> None:
        self.count, self._wait_s = count, wait_s
        self._running: Counter[Hashable] = Counter()
        self._pinned: set[Hashable] = set()
        self._line: deque[_Waiter] = deque()

    @property
    def waiting(self) -> int:
        return len(self._line)

    @property
    def pinned(self) -> int:
        return len(self._pinned)

    @asynccontextmanager
    async def place(self, adapter: Hashable) -> AsyncIterator[None]:
        """A place for one request of `adapter`; AdapterSlotsFull after `wait_s` seconds in line."""
        await self._take(adapter)
        try:
            yield
        finally:
            self._give_back(adapter)

    def pin(self, adapter: Hashable) -> bool:
        """Keep a place for `adapter`; False while there is none, or it would be the last."""
        if adapter not in self._pinned:
            taken = self._taken() | {adapter}
            if len(taken) > self.count or len(self._pinned) + 1 >= self.count:
                return False
            self._pinned.add(adapter)
        return True

    def unpin(self, adapter: Hashable) -> None:
        self._pinned.discard(adapter)
        self._call()

    def _taken(self) -> set[Hashable]:
        return self._pinned | set(self._running)

    def _open_to(self, adapter: Hashable) -> bool:
        taken = self._taken()
        return adapter in taken or len(taken) < self.count

    def _may_pass(self, adapter: Hashable) -> bool:
        if adapter in self._pinned or not self._line:
            return True
        patient = time.monotonic() - self._line[0].since < PATIENCE_S
        return patient and adapter in self._running

    async def _take(self, adapter: Hashable) -> None:
        if self._open_to(adapter) and self._may_pass(adapter):
            self._running[adapter] += 1
            return
        waiter = _Waiter(adapter)
        self._line.append(waiter)
        try:
            async with asyncio.timeout(self._wait_s):
                await waiter.called.wait()
        except BaseException as fault:
            if waiter.called.is_set():  # called and cancelled in one breath
                self._give_back(adapter)
            else:
                self._line.remove(waiter)
                self._call()
            if isinstance(fault, TimeoutError):
                raise self._full() from fault
            raise

    def _give_back(self, adapter: Hashable) -> None:
        self._running[adapter] -= 1
        if not self._running[adapter]:
            del self._running[adapter]
        self._call()

    def _call(self) -> None:
        """Let in from the front of the line whoever has room, in order."""
        while self._line and self._open_to(self._line[0].adapter):
            waiter = self._line.popleft()
            self._running[waiter.adapter] += 1
            waiter.called.set()

    def _full(self) -> AdapterSlotsFull:
        return AdapterSlotsFull(
            f"no adapter slot became free in {self._wait_s:g} s: {len(self._pinned)} of "
            f"{self.count} are pinned, the others are held by running requests; try again, or "
            "raise --max-adapters"
        )
