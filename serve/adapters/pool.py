"""Aliases and the immutable adapter versions behind them: lease, load beside, publish, retire.

A version is `alias@digest12` inside the engine, and its name is never used for other weights or
twice at once: vLLM keys cached prefixes and batches by name. A swap loads the new version beside
the old one, publishes it by one assignment, and unloads the old one when the last request that
holds it has ended. There may be more versions than places in a batch: the engine drops what was
not used for longest and reads it again from the store.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from serve.adapters import names
from serve.adapters.canary import share_of
from serve.adapters.locks import Locks
from serve.adapters.names import version_name
from serve.adapters.slots import Slots
from serve.adapters.store import Stored
from serve.errors import Conflict

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Version:
    """One adapter's weights in the engine; `leases` counts the requests that hold it."""

    alias: str
    stored: Stored
    slot: int  # the engine's id, never reused
    loaded_at: float
    leases: int = 0
    pinned: bool = False

    @property
    def digest(self) -> str:
        return self.stored.digest

    @property
    def name(self) -> str:
        return version_name(self.alias, self.digest)

    @property
    def soft(self) -> bool:
        """A soft prompt: part of the prompts, it needs no place in a batch."""
        return self.stored.virtual_tokens > 0


@dataclass(frozen=True, slots=True)
class Route:
    """What an alias is answered by: `canary` for the users whose share is below `weight`."""

    stable: Version
    canary: Version | None = None
    weight: float = 0.0
    pinned: bool = False

    @property
    def versions(self) -> tuple[Version, ...]:
        return (self.stable, self.canary) if self.canary else (self.stable,)

    def version_for(self, user: str) -> Version:
        if self.canary is not None and share_of(self.stable.alias, user) < self.weight:
            return self.canary
        return self.stable


class Engine(Protocol):
    """What the pool needs of vLLM."""

    async def load(self, version: Version) -> None: ...
    async def pin(self, version: Version) -> bool: ...
    async def unload(self, version: Version) -> None: ...


class AdapterPool:
    """Every method runs in the event loop's thread; one lock per version orders its loads.

    `base_names` are what the base answers to: no alias is published under one of them.
    """

    def __init__(self, engine: Engine, slots: Slots, base_names: Collection[str] = ()) -> None:
        self._engine, self.slots, self.locks = engine, slots, Locks()
        self.base_names = frozenset(base_names)
        self._pinning = asyncio.Lock()
        self._live: dict[str, Route] = {}
        self._loaded: dict[str, Version] = {}  # by name
        self._ids = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._live)

    def live(self) -> dict[str, Route]:
        """The published aliases."""
        return dict(sorted(self._live.items()))

    def loaded(self) -> list[Version]:
        """Everything the engine was given, retired versions with requests included."""
        return list(self._loaded.values())

    def get(self, alias: str) -> Route | None:
        return self._live.get(alias)

    def lease(self, alias: str, user: str) -> Version | None:
        """The version of an alias that `user` gets, held until `release`."""
        route = self._live.get(alias)
        if route is None:
            return None
        version = route.version_for(user)
        version.leases += 1
        return version

    def asked(self, model: str) -> tuple[str, Version | None]:
        """The alias that a model id names; and the version, where it is `alias@digest` of one that
        is published here. A name that nothing is served under is an alias without a version."""
        alias, digest = names.asked(model) if model not in self.base_names else (model, "")
        route = self._live.get(alias)
        if not digest or route is None:
            return model, None
        found = (v for v in route.versions if v.digest.startswith(digest))
        version = next(found, None)
        return (alias, version) if version else (model, None)

    def hold(self, version: Version) -> Version:
        """Lease one version, whoever asks."""
        version.leases += 1
        return version

    def release(self, version: Version) -> None:
        """Give a lease back; a retired version leaves the engine with its last one."""
        version.leases -= 1
        self._retire_if_idle(version)

    @asynccontextmanager
    async def running(self, version: Version) -> AsyncIterator[None]:
        """A lease and a place in the engine's batches; AdapterSlotsFull when none becomes free."""
        version.leases += 1
        try:
            async with nullcontext() if version.soft else self.slots.place(version):
                yield
        finally:
            self.release(version)

    async def load(self, alias: str, stored: Stored) -> Version:
        """The version in the engine, loaded unless it is there; leased to the caller."""
        if not self.slots.count and not stored.virtual_tokens:
            raise Conflict("this server takes no LoRA: --max-adapters is 0")
        name = version_name(alias, stored.digest)
        async with self.locks[name]:
            version = self._loaded.get(name)
            if version is None:
                version = Version(alias, stored, next(self._ids), time.time())
                await self._engine.load(version)
                self._loaded[name] = version
            version.leases += 1
            return version

    async def publish(self, alias: str, route: Route | None) -> None:
        """Answer an alias by `route` from now on, None: by nothing; retire what it drops.

        BadRequest for a name that is the base's, or none: then the alias is answered by nothing.
        """
        if route is not None:
            names.check(alias, self.base_names)
        old = self._live.get(alias)
        if route is None:
            self._live.pop(alias, None)
        else:
            self._live[alias] = route
        for version in old.versions if old else ():
            self._retire_if_idle(version)
        await self.settle_pins()

    async def close(self) -> None:
        """End the retirements under way; an engine that is going away may never answer them."""
        running = list(self._tasks)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def settle_pins(self) -> None:
        """Pin what should be and has room (a predecessor may keep its place for a while).

        vLLM cannot unpin: what should be pinned no longer is taken out and put back, which running
        requests do not notice.
        """
        async with self._pinning:
            await self._settle_pins()

    async def _settle_pins(self) -> None:
        routes = (route for route in self._live.values() if route.pinned)
        wanted = {route.stable for route in routes if not route.stable.soft}
        for version in self.loaded():
            if version in wanted and not version.pinned and self.slots.pin(version):
                version.pinned = True
                if not await self._engine.pin(version):
                    self._unpin(version)
            elif version.pinned and version not in wanted and self._published(version):
                await self._engine.unload(version)
                self._unpin(version)
                await self._engine.load(version)

    def _unpin(self, version: Version) -> None:
        version.pinned = False
        self.slots.unpin(version)

    def _published(self, version: Version) -> bool:
        route = self._live.get(version.alias)
        return route is not None and version in route.versions

    def _idle(self, version: Version) -> bool:
        """Loaded for nobody: no request holds it and no alias leads to it."""
        there = self._loaded.get(version.name) is version
        return there and version.leases == 0 and not self._published(version)

    def _retire_if_idle(self, version: Version) -> None:
        if self._idle(version):
            task = asyncio.get_running_loop().create_task(self._unload(version))
            self._tasks.add(task)
            task.add_done_callback(partial(self._unloaded, version))

    def _unloaded(self, version: Version, task: asyncio.Task[None]) -> None:
        """Nobody awaits a retirement: what it failed with is told here."""
        self._tasks.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            logger.error("%s could not leave the engine: %s", version.name, fault)

    async def _unload(self, version: Version) -> None:
        async with self.locks[version.name]:
            if not self._idle(version):
                return  # somebody took it again
            await self._engine.unload(version)
            # Not before: a version that could not leave stays, and is no newcomer then.
            del self._loaded[version.name]
            self._unpin(version)
        await self.settle_pins()
