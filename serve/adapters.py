"""Aliases and the immutable adapter versions behind them: lease, swap, retire.

A version is `alias@digest12` inside the engine and its name is never used for other weights: vLLM
keys cached prefixes by name. A swap loads the new version beside the old one, publishes it by one
assignment, and unloads the old one when the last request that holds it has ended.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from serve.errors import AdapterSlotsFull, NotFound, ServeError
from serve.store import Base, Stored, take_in

logger = logging.getLogger(__name__)

ROOM_TIMEOUT_S = 10.0


@dataclass(slots=True, eq=False)
class Version:
    """One adapter's weights in the engine; `leases` counts the requests that hold it."""

    alias: str
    stored: Stored
    slot: int  # the engine's id, never reused
    loaded_at: float
    leases: int = 0

    @property
    def name(self) -> str:
        return f"{self.alias}@{self.stored.digest[:12]}"

    def facts(self) -> dict[str, Any]:
        """What the admin routes tell."""
        return {
            "alias": self.alias,
            "version": self.name,
            "digest": self.stored.digest,
            "rank": self.stored.rank,
            "loaded_at": int(self.loaded_at),
            "requests": self.leases,
        }


class Engine(Protocol):
    """What the pool needs of vLLM."""

    async def load(self, version: Version) -> None: ...
    async def unload(self, version: Version) -> None: ...


class AdapterPool:
    """Every method runs in the event loop's thread; one lock per alias orders its swaps."""

    def __init__(self, engine: Engine, base: Base, state_dir: Path, aliases: int) -> None:
        self._engine, self._base, self._state_dir = engine, base, state_dir
        self._aliases, self._versions = aliases, aliases + 1  # one slot is free for a swap
        self._live: dict[str, Version] = {}
        self._loaded: set[Version] = set()
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._changed = asyncio.Event()
        self._slots = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._live)

    def live(self) -> list[Version]:
        """The published versions, by alias."""
        return [self._live[alias] for alias in sorted(self._live)]

    def get(self, alias: str) -> Version | None:
        """The published version of an alias."""
        return self._live.get(alias)

    def lease(self, alias: str) -> Version | None:
        """The published version, held until `release`."""
        version = self._live.get(alias)
        if version is not None:
            version.leases += 1
        return version

    def release(self, version: Version) -> None:
        """Give a lease back; a retired version leaves the engine with its last one."""
        version.leases -= 1
        self._retire_if_idle(version)

    async def put(self, alias: str, source: Path) -> Version:
        """Make `alias` the adapter in folder `source`, whatever it was before.

        AdapterRefused when it does not fit the base; AdapterSlotsFull when every slot is held.
        The alias keeps its old version unless this returns.
        """
        stored = await asyncio.to_thread(take_in, source, self._base, self._state_dir / "store")
        async with self._locks[alias]:
            old = self._live.get(alias)
            if old is not None and old.stored.digest == stored.digest:
                return old
            if old is None and len(self._live) >= self._aliases:
                raise AdapterSlotsFull(
                    f"{len(self._live)} adapters are loaded, the most this server takes; "
                    "delete one or raise --max-adapters"
                )
            fresh = await self._load(alias, stored)
            self._live[alias] = fresh
            self._remember()
            if old is not None:
                self._retire_if_idle(old)
        return fresh

    async def delete(self, alias: str) -> None:
        """Unpublish; requests that hold it run to their end. NotFound for an unknown alias."""
        async with self._locks[alias]:
            version = self._live.pop(alias, None)
            if version is None:
                raise NotFound(f"no adapter {alias!r} is loaded", param="alias")
            self._remember()
            self._retire_if_idle(version)

    async def restore(self, wanted: dict[str, Path]) -> None:
        """Load what was live when the last worker ended, and what the operator asked for.

        An adapter that no longer loads is logged and left out; the others are served.
        """
        for alias, folder in {**wanted, **self._remembered()}.items():
            try:
                await self.put(alias, folder)
            except ServeError as fault:
                logger.error("adapter %s is not served: %s", alias, fault)  # noqa: TRY400

    async def _load(self, alias: str, stored: Stored) -> Version:
        try:
            async with asyncio.timeout(ROOM_TIMEOUT_S):
                while len(self._loaded) >= self._versions:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError as fault:
            raise AdapterSlotsFull(
                "every adapter slot is held by running requests of versions on their way out"
            ) from fault
        version = Version(alias, stored, next(self._slots), time.time())
        self._loaded.add(version)
        try:
            await self._engine.load(version)
        except BaseException:
            self._forget(version)
            raise
        return version

    def _retire_if_idle(self, version: Version) -> None:
        published = self._live.get(version.alias) is version
        if version.leases == 0 and not published and version in self._loaded:
            task = asyncio.get_running_loop().create_task(self._unload(version))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _unload(self, version: Version) -> None:
        await self._engine.unload(version)
        self._forget(version)

    def _forget(self, version: Version) -> None:
        self._loaded.discard(version)
        self._changed.set()

    def _remember(self) -> None:
        """What a restarted worker loads again: alias -> folder in the store, by one rename."""
        path = self._state_dir / "adapters.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".partial")
        fresh.write_text(json.dumps({v.alias: str(v.stored.folder) for v in self.live()}))
        os.replace(fresh, path)

    def _remembered(self) -> dict[str, Path]:
        path = self._state_dir / "adapters.json"
        if not path.is_file():
            return {}
        return {alias: Path(folder) for alias, folder in json.loads(path.read_text()).items()}
