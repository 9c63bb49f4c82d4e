"""Brings this replica to what the registry says: at start, after every change, for ever.

The registry's revision is read every few seconds. What cannot be loaded is recorded with its
reason and tried again, less and less often; whatever is loaded goes on serving meanwhile, also
while the registry is silent, damaged or gone. No alias waits for another's files, and no fault of
one ends the others' way. The last state seen is kept in a file, for a start without the registry.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Collection, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from serve.adapters import last_seen, names
from serve.adapters.intake import Intake
from serve.adapters.last_seen import Seen
from serve.adapters.locks import Locks
from serve.adapters.names import version_name
from serve.adapters.pool import AdapterPool, Route, Version
from serve.adapters.registry import Registry
from serve.adapters.rows import Alias, Snapshot, State
from serve.adapters.store import Stored
from serve.errors import NotFound, RegistryDown, ServeError
from serve.metrics import Metrics

logger = logging.getLogger(__name__)
T = TypeVar("T")
Sources = Mapping[str, str]  # by digest

PAUSES_S = (2, 5, 15, 60, 300)  # between attempts at a version that does not load
AT_ONCE = 4  # aliases that are loaded together
START_WAIT_S, TURN_WAIT_S = 120.0, 5.0  # that others wait for an alias whose files do not come
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
        intake: Intake,
        pool: AdapterPool,
        metrics: Metrics,
        cache: Path,
    ) -> None:
        self._registry, self._intake, self._pool, self._metrics = registry, intake, pool, metrics
        self.seen = Snapshot(-1, {}, {})
        self.rows: dict[str, Alias] = {}  # as seen, and as changed here since
        self.failures: dict[tuple[str, str], Failure] = {}
        self.locks = Locks()
        self.given: set[str] = set()  # served, though the registry could not be told of them yet
        self._cache, self._last = cache, last_seen.read(cache)
        if self._last is not None:
            registry.expect(self._last.identity)
        self._changed_here: dict[str, int] = {}  # alias -> revision of a change not yet seen
        self._changed = asyncio.Event()
        self._few = asyncio.Semaphore(AT_ONCE)
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._late: set[str] = set()  # under way since before the last look
        self._look_again = self._unkept = False
        self._silence = ""
        self._reported: tuple[State, ...] = ()
        self._reported_at = self._swept_at = -SWEEP_EVERY_S

    async def start(self, every_s: float) -> bool:
        """Load what the registry wants; returns when that was tried once: whether it answers.

        A registry that does not is replaced by the last state seen here. Without one, a database
        elsewhere is waited for, and one of this machine's own is done without.
        """
        while not await self._first_turn():
            if self._last is not None:
                logger.error("serving the adapters last seen: %s", self._cache)
                await self._converge(replace(self._last.snapshot, revision=-1), START_WAIT_S)
                return False
            if self._registry.local:
                return False
            await asyncio.sleep(every_s)
        return True

    async def _first_turn(self) -> bool:
        outcome = (await asyncio.gather(self.turn(START_WAIT_S), return_exceptions=True))[0]
        if isinstance(outcome, BaseException):  # ours to mend: the base is served meanwhile
            logger.error("the registry could not be followed", exc_info=outcome)
            return False
        return outcome

    async def watch(self, every_s: float) -> None:
        """Turn after turn, and right after a change made here, until cancelled."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(every_s):
                    await self._changed.wait()
            self._changed.clear()
            turn = asyncio.gather(self.turn(), return_exceptions=True)
            for outcome in await turn:
                if isinstance(
                    outcome, BaseException
                ):  # ours to mend, and no reason to stop looking
                    logger.error("the registry could not be followed", exc_info=outcome)

    async def turn(self, wait_s: float = TURN_WAIT_S) -> bool:
        """One look at the registry and what follows from it; False when it is silent.

        Waits for `wait_s` for what follows; what takes longer goes on beside later turns.
        """
        try:
            if await self._registry.revision() != self.seen.revision or self._unkept:
                await self._follow_registry(wait_s)
            elif self._is_due():
                await self._converge(self.seen, wait_s)
            await self._report()
        except RegistryDown as fault:
            if self._silence != str(fault):
                logger.error("%s; what is loaded goes on serving", fault)  # noqa: TRY400
            self._silence = str(fault)
            self._metrics.registry_up.set(0)
            return False
        if self._silence:
            logger.error("the adapter registry answers again")
        self._silence = ""
        self._metrics.registry_up.set(1)
        self._metrics.reconciled.set_to_current_time()
        return True

    async def close(self) -> None:
        """End what is under way; threads that hang are not waited for."""
        running = list(self._under_way.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        self._intake.close()

    async def obtain(self, alias: str, digest: str, source: str | None) -> Version:
        """A version in the engine, leased to the caller; its files fetched if they are not here."""
        version = await self._pool.load(alias, await self.files(alias, digest, source))
        self.failures.pop((alias, digest), None)
        return version

    async def files(
        self, alias: str, digest: str, source: str | None, patience_s: float | None = None
    ) -> Stored:
        """A version's files in the store, fetched if they are not there; `patience_s` as in
        Intake.take_in."""
        stored = await self._intake.find(digest)
        if stored is None and source is None:
            raise NotFound(f"the registry has no source for {version_name(alias, digest)}")
        return stored or await self._intake.take_in(source or "", digest, patience_s=patience_s)

    async def apply(self, alias: str, row: Alias | None, revision: int, sources: Sources) -> None:
        """Publish a change made here, under the alias's lock: the next look must not undo it."""
        self._changed_here[alias] = revision
        await self._follow(alias, row, sources)
        self._count()
        self._changed.set()

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

    async def _follow_registry(self, wait_s: float) -> None:
        snapshot = await self._registry.snapshot()
        last = self._last.snapshot if self._last else snapshot
        if snapshot.revision == last.revision and last.aliases and not snapshot.aliases:
            raise RegistryDown(
                f"the adapter registry has lost the {len(last.aliases)} aliases that it had at "
                f"revision {last.revision}: `quantserve registry restore` brings them back"
            )
        if snapshot.revision < self.seen.revision:
            logger.error("the registry is an older copy: revision %d", snapshot.revision)
            self._changed_here.clear()
        await self._remember(Seen(self._registry.identity or "", snapshot))
        await self._converge(snapshot, wait_s)

    async def _remember(self, seen: Seen) -> None:
        """A convenience: a full disk does not keep anybody from serving."""
        writing = asyncio.to_thread(last_seen.write, self._cache, seen)
        fault = (await asyncio.gather(writing, return_exceptions=True))[0]
        if fault is None:
            self._last = seen
        elif not self._unkept:
            logger.error("%s cannot be written, and a start without the registry would not know "
                         "its adapters: %s", self._cache, fault)  # fmt: skip
        self._unkept = fault is not None

    def _is_due(self) -> bool:
        now = time.monotonic()
        return self._look_again or any(failure.again <= now for failure in self.failures.values())

    async def _converge(self, snapshot: Snapshot, wait_s: float = TURN_WAIT_S) -> None:
        wanted = {
            (row.alias, digest) for row in snapshot.aliases.values() for digest in row.digests
        }
        for gone in set(self.failures) - wanted:
            del self.failures[gone]
        self._look_again = False
        self._late = set(self._under_way)
        self.given -= set(snapshot.aliases)
        new = {*self.rows, *self._pool.live(), *snapshot.aliases} - self._late - self.given
        for alias in new:
            task = asyncio.create_task(self._converge_alias(alias, snapshot))
            self._under_way[alias] = task
            task.add_done_callback(partial(self._arrived, alias, snapshot.aliases.get(alias)))
        self.seen = snapshot
        if new:
            await asyncio.wait([self._under_way[alias] for alias in new], timeout=wait_s)
        self._count()

    def _arrived(self, alias: str, row: Alias | None, task: asyncio.Task[None]) -> None:
        """What one alias ended with is its own."""
        del self._under_way[alias]
        self._look_again |= alias in self._late
        fault = None if task.cancelled() else task.exception()
        if fault is not None:
            logger.error("%s could not be brought to what the registry says", alias, exc_info=fault)
            for digest in row.digests if row else ():
                self._note_failure(alias, digest, fault)
        self._count()

    async def _converge_alias(self, alias: str, snapshot: Snapshot) -> None:
        row = snapshot.aliases.get(alias)
        records = (snapshot.records.get((alias, digest)) for digest in row.digests) if row else ()
        sources = {r.digest: r.source for r in records if r}
        lost = await self._bring_files(row, sources) if row is not None else set[str]()
        async with self.locks[alias], self._few:
            if self._changed_here.get(alias, -1) <= snapshot.revision:
                self._changed_here.pop(alias, None)
                await self._follow(alias, row, sources, lost)

    async def _bring_files(self, row: Alias, sources: Sources) -> set[str]:
        """Into the store, before the alias's lock is taken: who replaces a source that hangs does
        not wait for it. Returns the versions whose files did not come."""
        lost: set[str] = set()
        if names.fault(row.alias, self._pool.base_names) or self._matches(row):
            return lost
        for digest in row.digests:
            if not self._is_paused(row.alias, digest):
                files = self.files(row.alias, digest, sources.get(digest))
                if await self._tried(row.alias, digest, files) is None:
                    lost.add(digest)
        return lost

    async def _follow(
        self, alias: str, row: Alias | None, sources: Sources, lost: Collection[str] = ()
    ) -> None:
        wanted = row.digests if row is not None else ()
        for failed in [key for key in self.failures if key[0] == alias and key[1] not in wanted]:
            del self.failures[failed]
        if row is None:
            self.rows.pop(alias, None)
            await self._pool.publish(alias, None)
            self._metrics.forget(alias)
            return
        self.rows[alias] = row
        why = names.fault(alias, self._pool.base_names)
        if why is not None:
            await self._refuse(row, why)
        elif not self._matches(row):
            await self._bring(row, sources, lost)
        if row.canary is None:
            self._metrics.forget_canary(alias)

    async def _refuse(self, row: Alias, why: str) -> None:
        """An alias that cannot be: of a replica with another base, say. The base answers."""
        for digest in row.digests:
            if (row.alias, digest) not in self.failures:
                logger.error("%s is not served: %s", version_name(row.alias, digest), why)
            self.failures[row.alias, digest] = Failure(why, 1, math.inf)
        await self._pool.publish(row.alias, None)

    def _count(self) -> None:
        self._metrics.adapters_desired.set(len(self.rows))
        self._metrics.adapters_failed.set(len(self.failures))

    async def _bring(self, row: Alias, sources: Sources, lost: Collection[str]) -> None:
        """Publish what `row` says, under the alias's lock. What fails is recorded, and left out, as
        is what is `lost`.

        Without its stable version an alias keeps the one it has.
        """
        held: dict[str, Version] = {}
        for digest in (each for each in row.digests if each not in lost):
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

    def _is_paused(self, alias: str, digest: str) -> bool:
        before = self.failures.get((alias, digest))
        return before is not None and before.again > time.monotonic()

    async def _attempt(self, alias: str, digest: str, source: str | None) -> Version | None:
        if self._is_paused(alias, digest):
            return None
        return await self._tried(alias, digest, self.obtain(alias, digest, source))

    async def _tried(self, alias: str, digest: str, trying: Coroutine[Any, Any, T]) -> T | None:
        """What comes of it; None, and the reason noted, when that is a fault of any kind."""
        outcome = (await asyncio.gather(trying, return_exceptions=True))[0]
        if isinstance(outcome, BaseException):
            self._note_failure(alias, digest, outcome)
            return None
        return outcome

    def _note_failure(self, alias: str, digest: str, fault: BaseException) -> None:
        before = self.failures.get((alias, digest))
        attempts = before.attempts + 1 if before else 1
        pause = PAUSES_S[min(attempts, len(PAUSES_S)) - 1]
        ours = isinstance(fault, ServeError)
        reason = str(fault) if ours else f"{type(fault).__name__}: {fault}"
        self.failures[alias, digest] = Failure(reason, attempts, time.monotonic() + pause)
        unexpected = None if ours else fault
        name = version_name(alias, digest)
        logger.error("%s is not served: %s", name, reason, exc_info=unexpected)

    async def _report(self) -> None:
        """Tell the registry what changed, or that we are still here; sweep the store at times."""
        states, now = self.states(), time.monotonic()
        if states == self._reported and now - self._reported_at < REPORT_EVERY_S:
            return
        needed = await self._registry.report(states)
        self._reported, self._reported_at = states, now
        if now - self._swept_at > SWEEP_EVERY_S:
            self._swept_at = now
            gone = await self._intake.sweep(needed)
            if gone:
                logger.warning("removed from the store: %s", ", ".join(gone))
