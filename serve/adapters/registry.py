"""What every replica should serve: aliases, versions, history and states, in SQL.

A SQLite file, or PostgreSQL by URL. Every change is one short transaction that raises the revision
and writes its own history; an alias that changed since its caller read it is a Conflict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from serve.adapters import queries, schema
from serve.adapters.database import Database
from serve.adapters.rows import Alias, Event, Record, Snapshot, State

# Gets the row as it is and returns the row to write, None to delete it. What it raises (Conflict,
# NotFound) leaves everything as it was.
Edit = Callable[[Alias | None], Alias | None]


class Registry:
    """The database as the admin routes and the reconciler see it."""

    def __init__(self, url: str, replica: str, *, keep: int) -> None:
        self.replica, self._keep = replica, keep
        self._database = Database(url)

    async def prepare(self) -> None:
        """Create or migrate the tables."""
        await self._database.write(schema.prepare)

    async def revision(self) -> int:
        """Unchanged: nothing changed."""
        return await self._database.read(queries.revision)

    async def snapshot(self) -> Snapshot:
        return await self._database.read(queries.snapshot)

    async def alias(self, alias: str) -> Alias | None:
        return await self._database.read(lambda c: queries.alias(c, alias))

    async def records(self, alias: str) -> list[Record]:
        """The versions an alias can go back to, newest first."""
        return await self._database.read(lambda c: queries.records(c, alias))

    async def history(self, alias: str, limit: int) -> list[dict[str, Any]]:
        """Newest first."""
        return await self._database.read(lambda c: queries.events(c, alias, limit))

    async def states(self, alias: str) -> list[dict[str, Any]]:
        """What every replica says of an alias."""
        return await self._database.read(lambda c: queries.states(c, alias))

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

        return await self._database.write(work)

    async def tell(self, told: Event) -> None:
        """History alone: what was tried and came to nothing."""
        await self._database.write(lambda c: queries.add_event(c, told, self.replica))

    async def report(self, states: Iterable[State]) -> set[str]:
        """Say what this replica serves; returns the digests that anyone still needs."""
        rows = tuple(states)
        return await self._database.write(lambda c: queries.report(c, self.replica, rows))

    def close(self) -> None:
        self._database.close()


def sqlite_url(state_dir: Path) -> str:
    """The default: a file beside the store."""
    return f"sqlite:///{state_dir / 'registry.sqlite'}"
