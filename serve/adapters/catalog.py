"""What an administrator does to aliases: put, canary, promote, roll back, pin, delete.

Every change takes one way: the new version is fetched and loaded beside the old one, then the
registry is changed, then it is published here. A crash in between leaves the registry's word, and
what came to nothing stands in the history with its reason.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace

from serve.adapters import names
from serve.adapters.intake import PATIENCE_S, Intake
from serve.adapters.names import version_name
from serve.adapters.pool import AdapterPool
from serve.adapters.reconciler import Reconciler
from serve.adapters.registry import Registry
from serve.adapters.rows import Alias, Event, Record
from serve.errors import (
    AdapterRefused,
    BadRequest,
    Conflict,
    NotFound,
    PreconditionFailed,
    RegistryDown,
    ServeError,
)

SHORTEST_DIGEST = 6


@dataclass(frozen=True, slots=True)
class By:
    """Who asks, and for which revision of the alias; None: whichever it has."""

    who: str
    revision: int | None = None


class Catalog:
    """Changes to the registry, carried out on this replica first."""

    def __init__(
        self, registry: Registry, intake: Intake, pool: AdapterPool, reconciler: Reconciler
    ) -> None:
        self._registry, self._intake = registry, intake
        self._pool, self._reconciler = pool, reconciler

    async def put(
        self, alias: str, source: str, by: By, *, pinned: bool | None = None, new: bool = False
    ) -> Alias:
        """Make `alias` the adapter at `source`; `new`: Conflict when there is such an alias.

        AdapterRefused when it does not fit the base. The alias keeps what it had unless this
        returns.
        """
        names.check(alias, self._pool.base_names)
        async with self._told(alias, "put", by):
            await self._check(alias, by, new=new)
            record = await self._take_in(alias, source, by)

            def edit(row: Alias | None) -> Alias:
                row = row or Alias(alias, record.digest)
                kept = row.pinned if pinned is None else pinned
                return _with_stable(replace(row, pinned=kept), record.digest)

            return await self._carry_out(alias, "put", by, edit, record)

    async def pin(self, alias: str, by: By, *, pinned: bool) -> Alias:
        """Keep the alias's version in its slot, or let it share."""
        return await self._edit(alias, "pin", by, lambda row: replace(row, pinned=pinned))

    async def canary(
        self, alias: str, by: By, weight: float, *, source: str = "", version: str = ""
    ) -> Alias:
        """Give a share of the users another version; neither source nor version: the same one."""
        names.check(alias, self._pool.base_names)
        async with self._told(alias, "canary", by):
            row = await self._check(alias, by)
            record = await self._take_in(alias, source, by) if source else None
            digest = record.digest if record else row.canary if row else None
            if version:
                digest = (await self._record(alias, version)).digest
            if digest is None:
                raise BadRequest(f"{alias!r} has no canary: give a source or a version")

            def edit(row: Alias | None) -> Alias:
                row = _there(alias, row)
                if digest == row.stable:
                    raise Conflict(f"{version_name(alias, digest)} serves {alias!r} already")
                return replace(row, canary=digest, weight=weight)

            return await self._carry_out(alias, "canary", by, edit, record)

    async def promote(self, alias: str, by: By) -> Alias:
        """The canary becomes the version for everybody."""

        def edit(row: Alias) -> Alias:
            return _with_stable(row, _canary_of(row))

        return await self._edit(alias, "promote", by, edit)

    async def drop_canary(self, alias: str, by: By) -> Alias:
        """Everybody gets the stable version again."""

        def edit(row: Alias) -> Alias:
            _canary_of(row)
            return replace(row, canary=None, weight=0.0)

        return await self._edit(alias, "drop canary", by, edit)

    async def roll_back(self, alias: str, by: By, version: str = "") -> Alias:
        """Back to the version before, or to a named one."""
        async with self._told(alias, "rollback", by):
            row = _there(alias, await self._check(alias, by))
            if not version and row.previous is None:
                raise Conflict(f"{alias!r} has had one version only: nothing to go back to")
            record = await self._record(alias, version or row.previous or "")

            def edit(row: Alias | None) -> Alias:
                return _with_stable(_there(alias, row), record.digest)

            return await self._carry_out(alias, "rollback", by, edit)

    async def delete(self, alias: str, by: By) -> None:
        """Unpublish everywhere; requests that hold a version run to their end."""
        async with self._reconciler.locks[alias]:
            before = _there(alias, await self._check(alias, by))
            told = Event(alias, "delete", by.who, before=before.stable)

            def edit(row: Alias | None) -> None:
                _same(before, row)

            _, revision = await self._registry.change(edit, told)
            await self._reconciler.apply(alias, None, revision, {})

    async def _edit(self, alias: str, action: str, by: By, edit: Callable[[Alias], Alias]) -> Alias:
        async with self._told(alias, action, by):
            return await self._carry_out(alias, action, by, lambda row: edit(_there(alias, row)))

    async def _carry_out(
        self, alias: str, action: str, by: By, edit: Callable[[Alias | None], Alias],
        record: Record | None = None,
    ) -> Alias:  # fmt: skip
        """Load what is new, write, publish; the writer's row must be the one that was read."""
        async with self._reconciler.locks[alias], AsyncExitStack() as held:
            before = await self._check(alias, by)
            after = edit(before)
            if after == before:
                await self._retry(before)
                return before
            if after.pinned and not (before and before.pinned):
                await self._check_pins(alias)
            records = [*await self._registry.records(alias), *([record] if record else [])]
            sources = {r.digest: r.source for r in records}
            for digest in set(after.digests) - set(before.digests if before else ()):
                source = sources.get(digest, "")
                version = await self._reconciler.obtain(alias, digest, source)
                held.callback(self._pool.release, version)

            def guarded(row: Alias | None) -> Alias:
                _same(before, row)
                return after

            told = _event(action, by, before, after)
            row, revision = await self._registry.change(guarded, told, record)
            await self._reconciler.apply(alias, row, revision, sources)
            return replace(after, revision=revision)

    async def _retry(self, row: Alias) -> None:
        """Nothing to change: but what failed here is tried again now, since somebody asks."""
        records = await self._registry.records(row.alias)
        for digest in row.digests:
            self._reconciler.failures.pop((row.alias, digest), None)
        sources = {record.digest: record.source for record in records}
        await self._reconciler.apply(row.alias, row, row.revision, sources)

    async def _check(self, alias: str, by: By, *, new: bool = False) -> Alias | None:
        """The row as it is, if it is what the caller takes it for."""
        row = await self._registry.alias(alias)
        if by.revision is not None and by.revision != (row.revision if row else 0):
            there = f"revision {row.revision}" if row else "not there"
            raise PreconditionFailed(f"{alias!r} is {there}, not revision {by.revision}")
        if new and row is not None:
            raise Conflict(f"{alias!r} is there already", param="alias")
        return row

    async def _check_pins(self, alias: str) -> None:
        """The last slot is everybody's: were it pinned too, the others would wait for ever."""
        rows = (await self._registry.snapshot()).aliases.values()
        pinned = sorted(row.alias for row in rows if row.pinned and row.alias != alias)
        if len(pinned) + 1 >= self._pool.slots.count:
            raise Conflict(
                f"every slot that can be pinned is: {', '.join(pinned)}; unpin one or raise "
                "--max-adapters",
                param="pinned",
            )

    async def _take_in(self, alias: str, source: str, by: By) -> Record:
        stored = await self._intake.take_in(source)
        made = time.time()
        return Record(alias, stored.digest, stored.source, stored.rank, stored.bytes, made, by.who)

    async def _record(self, alias: str, version: str) -> Record:
        """The one version that `version` names: ALIAS@DIGEST or the beginning of a digest.

        Its files are in the store then.
        """
        digest = version.removeprefix(f"{alias}@")
        records = await self._registry.records(alias)
        found = [record for record in records if record.digest.startswith(digest)]
        if len(found) != 1 or len(digest) < SHORTEST_DIGEST:
            known = ", ".join(version_name(alias, record.digest) for record in records)
            raise NotFound(
                f"{version!r} is no version of {alias!r}; known: {known or 'none'}",
                param="version",
            )
        # Now, and not under the alias's lock: its source may take minutes.
        await self._reconciler.files(alias, found[0].digest, found[0].source, PATIENCE_S)
        return found[0]

    @asynccontextmanager
    async def _told(self, alias: str, action: str, by: By) -> AsyncIterator[None]:
        """What fails is history too, as far as the registry takes it."""
        try:
            yield
        except ServeError as fault:
            result = "refused" if isinstance(fault, AdapterRefused) else "failed"
            told = Event(alias, action, by.who, result=result, reason=str(fault))
            with suppress(RegistryDown):
                await self._registry.tell(told)
            raise


def _event(action: str, by: By, before: Alias | None, after: Alias) -> Event:
    return Event(
        after.alias,
        action,
        by.who,
        before=before.stable if before else None,
        after=after.canary if action == "canary" else after.stable,
        weight=after.weight if after.canary else None,
    )


def _with_stable(row: Alias, digest: str) -> Alias:
    """A canary that became the stable version is no canary."""
    if digest == row.stable:
        return row
    row = replace(row, stable=digest, previous=row.stable)
    return replace(row, canary=None, weight=0.0) if row.canary == digest else row


def _there(alias: str, row: Alias | None) -> Alias:
    if row is None:
        raise NotFound(f"there is no adapter {alias!r}", param="alias")
    return row


def _canary_of(row: Alias) -> str:
    if row.canary is None:
        raise Conflict(f"{row.alias!r} has no canary")
    return row.canary


def _same(before: Alias | None, now: Alias | None) -> None:
    if (before and before.revision) != (now and now.revision):
        raise Conflict(
            "the alias was changed by somebody else meanwhile; look at it and try again",
            param="alias",
        )
