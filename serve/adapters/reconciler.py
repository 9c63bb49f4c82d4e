"""Brings this replica to what the registry says: at start, after every change, for ever.

The registry's revision is read every few seconds. What cannot be loaded is recorded with its
reason and tried again, less and less often; whatever is loaded goes on serving meanwhile, also
while the registry is silent. The last state seen is kept in a file, for a start without it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from serve.adapters.locks import Locks
from serve.adapters.pool import AdapterPool, Route, Version, version_name
from serve.adapters.registry import Registry
from serve.adapters.rows import Alias, Record, Snapshot, State
from serve.adapters.store import Store
from serve.errors import NotFound, RegistryDown, ServeError
from serve.metrics import Metrics

logger = logging.getLogger(__name__)
Sources = Mapping[str, str]  # by digest

PAUSES_S = (2, 5, 15, 60, 300)  # between attempts at a version that does not load
AT_ONCE = 4  # aliases that are fetched and loaded together: one slow source holds up three others
REPORT_EVERY_S = 30.0
SWEEP_EVERY_S = 600.0


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a version is not served, and when it is tried again (monotonic seconds)."""

    reason: str
    attempts: int
    again: float


class Reconciler:
    """One replica's way to the registry's state."""

    def __init__(
        self,
        registry: Registry,
        store: Store,
        pool: AdapterPool,
        metrics: Metrics,
        cache: Path,
    ) -> None:
        self._registry, self._store, self._pool, self._metrics = registry, store, pool, metrics
        self.seen = Snapshot(-1, {}, {})
        self.rows: dict[str, Alias] = {}  # as seen, and as changed here since
        self.failures: dict[tuple[str, str], Failure] = {}
        self.locks = Locks()
        self._cache = cache
        self._changed_here: dict[str, int] = {}  # alias -> revision of a change not yet seen
        self._prepared = False
        self._answers: bool | None = None
        self._reported: tuple[State, ...] = ()
        self._reported_at = self._swept_at = -SWEEP_EVERY_S

    async def start(self, every_s: float) -> None:
        """Load what the registry wants; returns when that was tried once.

        A silent registry is replaced by the last state seen here; without one it is waited for.
        """
        while not await self.turn():
            cached = self._cached()
            if cached is not None:
                logger.error("serving the adapters last seen %s", self._cache)
                await self._converge(cached)
                return
            await asyncio.sleep(every_s)

    async def watch(self, every_s: float) -> None:
        """Turn after turn, until cancelled."""
        while True:
            await asyncio.sleep(every_s)
            turn = asyncio.gather(self.turn(), return_exceptions=True)
            for outcome in await turn:
                if isinstance(
                    outcome, BaseException
                ):  # ours to mend, and no reason to stop looking
                    logger.error("the registry could not be followed", exc_info=outcome)

    async def turn(self) -> bool:
        """One look at the registry and what follows from it; False when it is silent."""
        try:
            if not self._prepared:
                await self._registry.prepare()
                self._prepared = True
            if await self._registry.revision() != self.seen.revision:
                snapshot = await self._registry.snapshot()
                await self._converge(snapshot)
                await asyncio.to_thread(self._remember, snapshot)
            elif any(failure.again <= time.monotonic() for failure in self.failures.values()):
                await self._converge(self.seen)
            await self._report()
        except RegistryDown as fault:
            if self._answers is not False:
                logger.error("%s; what is loaded goes on serving", fault)  # noqa: TRY400
            self._answers = False
            self._metrics.registry_up.set(0)
            return False
        if self._answers is False:
            logger.error("the adapter registry answers again")
        self._answers = True
        self._metrics.registry_up.set(1)
        self._metrics.reconciled.set_to_current_time()
        return True

    async def obtain(self, alias: str, digest: str, source: str) -> Version:
        """A version in the engine, leased to the caller; its files fetched if they are not here."""
        stored = await asyncio.to_thread(self._store.find, digest)
        if stored is None:
            stored = await asyncio.to_thread(self._store.take_in, source, digest)
        version = await self._pool.load(alias, stored)
        self.failures.pop((alias, digest), None)
        return version

    async def apply(self, alias: str, row: Alias | None, revision: int, sources: Sources) -> None:
        """Publish a change made here, under the alias's lock: the next look must not undo it."""
        self._changed_here[alias] = revision
        await self._follow(alias, row, sources)
        self._count()

    def states(self) -> tuple[State, ...]:
        """What this replica says of every version it has to do with."""
        published = {v for route in self._pool.live().values() for v in route.versions}
        told = {
            (v.alias, v.digest): State(
                v.alias, v.digest, "serving" if v in published else "retiring"
            )
            for v in self._pool.loaded()
        }
        for (alias, digest), failure in self.failures.items():
            told[alias, digest] = State(alias, digest, "failed", failure.reason)
        return tuple(told[key] for key in sorted(told))

    async def _converge(self, snapshot: Snapshot) -> None:
        wanted = {
            (row.alias, digest) for row in snapshot.aliases.values() for digest in row.digests
        }
        for gone in set(self.failures) - wanted:
            del self.failures[gone]
        few = asyncio.Semaphore(AT_ONCE)
        every = {*self.rows, *self._pool.live(), *snapshot.aliases}
        await asyncio.gather(*(self._converge_alias(alias, snapshot, few) for alias in every))
        self.seen = snapshot
        self._count()

    async def _converge_alias(self, alias: str, snapshot: Snapshot, few: asyncio.Semaphore) -> None:
        row = snapshot.aliases.get(alias)
        records = (snapshot.records.get((alias, digest)) for digest in row.digests) if row else ()
        async with few, self.locks[alias]:
            if self._changed_here.get(alias, -1) <= snapshot.revision:
                self._changed_here.pop(alias, None)
                await self._follow(alias, row, {r.digest: r.source for r in records if r})

    async def _follow(self, alias: str, row: Alias | None, sources: Sources) -> None:
        if row is None:
            self.rows.pop(alias, None)
            await self._pool.publish(alias, None)
            self._metrics.forget(alias)
            return
        self.rows[alias] = row
        if not self._matches(row):
            await self._bring(row, sources)
        if row.canary is None:
            self._metrics.forget_canary(alias)

    def _count(self) -> None:
        self._metrics.adapters_desired.set(len(self.rows))
        self._metrics.adapters_failed.set(len(self.failures))

    async def _bring(self, row: Alias, sources: Sources) -> None:
        """Publish what `row` says, under the alias's lock. What fails is recorded, and left out.

        Without its stable version an alias keeps the one it has.
        """
        held: dict[str, Version] = {}
        for digest in row.digests:
            version = await self._attempt(row.alias, digest, sources.get(digest))
            if version is not None:
                held[digest] = version
        try:
            stable = held.get(row.stable)
            if stable is not None:
                canary = held.get(row.canary) if row.canary else None
                route = Route(stable, canary, row.weight if canary else 0.0, row.pinned)
                await self._pool.publish(row.alias, route)
        finally:
            for version in held.values():
                self._pool.release(version)

    def _matches(self, row: Alias) -> bool:
        route = self._pool.get(row.alias)
        if route is None:
            return False
        there = tuple(version.digest for version in route.versions)
        same = route.pinned == row.pinned and (row.canary is None or route.weight == row.weight)
        return there == row.digests and same

    async def _attempt(self, alias: str, digest: str, source: str | None) -> Version | None:
        before = self.failures.get((alias, digest))
        if before is not None and before.again > time.monotonic():
            return None
        try:
            if source is None:
                raise NotFound(f"the registry has no source for {version_name(alias, digest)}")
            return await self.obtain(alias, digest, source)
        except ServeError as fault:
            self._note_failure(alias, digest, fault)
            return None

    def _note_failure(self, alias: str, digest: str, fault: ServeError) -> None:
        before = self.failures.get((alias, digest))
        attempts = before.attempts + 1 if before else 1
        pause = PAUSES_S[min(attempts, len(PAUSES_S)) - 1]
        self.failures[alias, digest] = Failure(str(fault), attempts, time.monotonic() + pause)
        logger.error("%s is not served: %s", version_name(alias, digest), fault)

    async def _report(self) -> None:
        """Tell the registry what changed, or that we are still here; sweep the store at times."""
        states, now = self.states(), time.monotonic()
        if states == self._reported and now - self._reported_at < REPORT_EVERY_S:
            return
        needed = await self._registry.report(states)
        self._reported, self._reported_at = states, now
        if now - self._swept_at > SWEEP_EVERY_S:
            self._swept_at = now
            gone = await asyncio.to_thread(self._store.sweep, needed)
            if gone:
                logger.warning("removed from the store: %s", ", ".join(gone))

    def _remember(self, snapshot: Snapshot) -> None:
        told = {
            "revision": snapshot.revision,
            "aliases": [asdict(row) for row in snapshot.aliases.values()],
            "records": [asdict(record) for record in snapshot.records.values()],
        }
        self._cache.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._cache.with_suffix(".partial")
        fresh.write_text(json.dumps(told))
        os.replace(fresh, self._cache)

    def _cached(self) -> Snapshot | None:
        try:
            told = json.loads(self._cache.read_text())
            aliases = [Alias(**row) for row in told["aliases"]]
            records = [Record(**row) for row in told["records"]]
        except (OSError, ValueError, TypeError, KeyError):
            return None
        by_version = {(r.alias, r.digest): r for r in records}
        return Snapshot(-1, {row.alias: row for row in aliases}, by_version)
