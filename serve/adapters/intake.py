"""The store's work off the event loop, each kind in threads of its own.

A source that hangs keeps its thread for minutes, so what comes from elsewhere may not use those in
which folders of this machine are taken in, and neither those in which the store itself is read. One
host may hang in a part of the threads only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar
from weakref import WeakValueDictionary

from serve.adapters import sources
from serve.adapters.store import Store, Stored
from serve.errors import SourcesBusy, SourceUnavailable

T = TypeVar("T")
Room = tuple[asyncio.Semaphore, ...]

NEAR = 4  # folders of this machine at once
PER_HOST = 3  # of the fetches from elsewhere
PATIENCE_S = 30.0  # that a caller waits for a thread
SPARE_S = 30.0  # for what the store does with an adapter that has been fetched


class Intake:
    """A store, asked from the event loop's thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._reading = ThreadPoolExecutor(NEAR, "store")
        self._near = ThreadPoolExecutor(NEAR, "intake")
        self._far = ThreadPoolExecutor(sources.FETCHES, "intake-far")
        self._rooms = {True: asyncio.Semaphore(sources.FETCHES), False: asyncio.Semaphore(NEAR)}
        self._hosts: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def find(self, digest: str) -> Stored | None:
        """Store.find."""
        return await self._in(self._reading, lambda: self._store.find(digest))

    async def sweep(self, needed: Collection[str]) -> list[str]:
        """Store.sweep."""
        return await self._in(self._reading, lambda: self._store.sweep(needed))

    async def take_in(
        self, source: str, expected: str | None = None, *, patience_s: float | None = PATIENCE_S
    ) -> Stored:
        """Store.take_in; SourcesBusy when no thread has become free in `patience_s`.

        None: whoever follows the registry has time, and nobody to tell.
        """
        host = self._store.sources.host(source)
        pool, longest_s = self._far if host else self._near, sources.FETCH_TIMEOUT_S + SPARE_S
        room = await self._room(host, patience_s)
        working = self._in(pool, lambda: self._store.take_in(source, expected))
        working.add_done_callback(partial(_leave, room))
        try:
            async with asyncio.timeout(longest_s):
                # Whoever waits may leave; the thread, and its room, are taken until it ends.
                return await asyncio.shield(working)
        except TimeoutError as late:
            raise SourceUnavailable(f"{source} took over {longest_s:g} s", param="source") from late

    def close(self) -> None:
        """Begin nothing more; what hangs is not waited for."""
        for pool in (self._reading, self._near, self._far):
            pool.shutdown(wait=False, cancel_futures=True)

    def _in(self, pool: ThreadPoolExecutor, work: Callable[[], T]) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(pool, work)

    async def _room(self, host: str, patience_s: float | None) -> Room:
        """Room for a source of this host, to be left."""
        room = (
            self._hosts.setdefault(host, asyncio.Semaphore(PER_HOST if host else NEAR)),
            self._rooms[bool(host)],
        )
        entered: list[asyncio.Semaphore] = []
        try:
            async with asyncio.timeout(patience_s):
                for door in room:
                    await door.acquire()
                    entered.append(door)
        except BaseException as fault:
            for door in entered:
                door.release()
            if isinstance(fault, TimeoutError):
                where = f"from {host}" if host else "from folders"
                busy = f"other adapters {where} are being taken in; try again"
                raise SourcesBusy(busy) from fault
            raise
        return room


def _leave(room: Room, working: asyncio.Future[Stored]) -> None:
    for door in room:
        door.release()
    if not working.cancelled():
        working.exception()  # told to whoever waited, if anybody did
