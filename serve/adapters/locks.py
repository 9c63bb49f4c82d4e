"""A lock for each name, there for as long as somebody holds it or waits for it.

Names come and go with every swap, and nothing may be kept of them in a server that swaps for
months.
"""

from __future__ import annotations

import asyncio
from weakref import WeakValueDictionary


class Locks:
    """Of one event loop's tasks: `async with locks[name]`."""

    def __init__(self) -> None:
        # A task that holds a lock or waits for it refers to it, so there are never two of a name.
        self._there: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def __getitem__(self, name: str) -> asyncio.Lock:
        return self._there.setdefault(name, asyncio.Lock())

    def __len__(self) -> int:
        return len(self._there)
