"""What every replica should serve: aliases, versions, history and states, in SQL.

A SQLite file, or PostgreSQL by URL. Every change is one short transaction that raises the revision
and writes its own history; an alias that changed since its caller read it is a Conflict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection

from serve.adapters import queries, schema
from serve.adapters.database import Database
from serve.adapters.rows import Alias, Event, Record, Snapshot, State
from serve.errors import RegistryDown, SettingsError

T = TypeVar("T")
# Gets the row as it is and returns the row to write, None to delete it. What it raises (Conflict,
# NotFound) leaves everything as it was.
Edit = Callable[[Alias | None], Alias | None]


class Registry:
    """The database as the admin routes and the reconciler see it.

    Once it has been seen, it answers only as the one that was seen: everything is RegistryDown in
    another database, or in one that was emptied.
    """

    def __init__(self, url: str, replica: str, *, keep: int) -> None:
        self.replica, self._keep = replica, keep
        self._database = Database(url)
        self._known: str | None = None
        self.identity: str | None = None

    @property
    def local(self) -> bool:
        """Whether it is this machine's own, so that nobody else will bring it back."""
        return self._database.local

    def expect(self, identity: str) -> None:
        """It was seen before, under this name; "": by a release that gave none."""
        self._known = identity
        self._database.was_there = True

    async def prepare(self) -> None:
        """Create or migrate the tables, unless it is not the one that is expected."""
        known = self._known
        self.identity = await self._database.write(lambda c: schema.prepare(c, known))
        self.expect(self.identity)

    async def revision(self) -> int:
        """Unchanged: nothing changed."""
        return await self._read(queries.revision)

    async def snapshot(self) -> Snapshot:
        return await self._read(queries.snapshot)

    async def alias(self, alias: str) -> Alias | None:
        return await self._read(lambda c: queries.alias(c, alias))

    async def records(self, alias: str) -> list[Record]:
        """The versions an alias can go back to, newest first."""
        return await self._read(lambda c: queries.records(c, alias))

    async def history(self, alias: str, limit: int) -> list[dict[str, Any]]:
        """Newest first."""
        return await self._read(lambda c: queries.events(c, alias, limit))

    async def states(self, alias: str) -> list[dict[str, Any]]:
        """What every replica says of an alias."""
        return await self._read(lambda c: queries.states(c, alias))

    async def change(
        self, edit: Edit, told: Event, record: Record | None = None
    ) -> tuple[Alias | None, int]:
        """Write what `edit` makes of the alias that `told` names, and `told`, in one transaction.

        Returns the row as written and the new revision.
        """

        def work(connection: Connection) -> tuple[Alias | None, int]:
            revision = queries.raise_revision(connection)
            row = edit(queries.alias(connection, told.alias))
            if row is not None:
                row = replace(row, revision=revision)
            if record is not None:
                queries.add_record(connection, record)
            queries.write_alias(connection, told.alias, row)
            queries.prune(connection, told.alias, row, self._keep)
            queries.add_event(connection, told, self.replica)
            return row, revision

        return await self._write(work)

    async def tell(self, told: Event) -> None:
        """History alone: what was tried and came to nothing."""
        await self._write(lambda c: queries.add_event(c, told, self.replica))

    async def report(self, states: Iterable[State]) -> set[str]:
        """Say what this replica serves; returns the digests that anyone still needs."""
        rows = tuple(states)
        return await self._write(lambda c: queries.report(c, self.replica, rows))

    def close(self) -> None:
        self._database.close()

    async def _read(self, work: Callable[[Connection], T]) -> T:
        return await self._database.read(await self._confirmed(work))

    async def _write(self, work: Callable[[Connection], T]) -> T:
        """Nothing is acknowledged that a damaged file may not hold."""
        confirmed = await self._confirmed(work)

        def written(connection: Connection) -> T:
            schema.check_pages(connection)
            return confirmed(connection)

        return await self._database.write(written)

    async def _confirmed(self, work: Callable[[Connection], T]) -> Callable[[Connection], T]:
        """The work, after a look at whether this is still the same registry."""
        if self.identity is None:
            try:
                await self.prepare()
            except SettingsError as fault:  # of a newer release; ours can serve what it has
                raise RegistryDown(str(fault)) from fault
        known = self.identity or ""

        def confirmed(connection: Connection) -> T:
            schema.confirm(connection, known)
            return work(connection)

        return confirmed


def sqlite_url(state_dir: Path) -> str:
    """The default: a file beside the store."""
    return f"sqlite:///{state_dir / 'registry.sqlite'}"
