"""A registry looked at from outside, and put right from the state that was seen last.

Works beside running servers: what is restored has the identity that they know, so that they go on
with it by themselves. A SQLite file is made anew and put in place by one rename; the damaged one is
kept beside it.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, func, select, update

from quant.durable import settle
from serve.adapters import queries, schema
from serve.adapters.database import Database
from serve.adapters.last_seen import Seen
from serve.adapters.rows import Event
from serve.errors import Conflict, RegistryDown

BESIDE = ("", "-wal", "-shm")  # SQLite's files, by what follows the name
ACTION, WHO = "restore", "quantserve registry restore"


@dataclass(frozen=True, slots=True)
class Found:
    """What a database holds; `fault` says why it is no registry that can be used."""

    name: str
    identity: str | None = None
    revision: int = 0
    aliases: tuple[str, ...] = ()
    events: int = 0
    fault: str = ""

    def told(self) -> str:
        if self.fault:
            return self.fault
        listed = f" ({', '.join(self.aliases[:8])}{', ...' * (len(self.aliases) > 8)})"
        return (
            f"identity {(self.identity or 'none')[:8]}, revision {self.revision}, "
            f"{len(self.aliases)} aliases{listed if self.aliases else ''}, {self.events} events"
        )


async def look(url: str) -> Found:
    """What is there; nothing is made or changed."""
    database = Database(url)
    database.was_there = True  # SQLite: make no new one
    try:
        return await database.read(lambda c: _look(c, database.name))
    except RegistryDown as fault:
        return Found(database.name, fault=str(fault))
    finally:
        database.close()


def differs(found: Found, seen: Seen | None) -> str:
    """Why the database cannot be the registry that was seen last; "" where it can."""
    if found.fault or seen is None:
        return found.fault
    if seen.identity and found.identity != seen.identity:
        return (
            f"it is not the registry {seen.identity[:8]} that was served from here, but "
            f"{(found.identity or 'one without identity')[:8]}"
        )
    wanted = seen.snapshot
    if found.revision < wanted.revision or (wanted.aliases and not found.aliases
                                            and found.revision == wanted.revision):  # fmt: skip
        return (
            f"it is at revision {found.revision} with {len(found.aliases)} aliases; revision "
            f"{wanted.revision} with {len(wanted.aliases)} was served from here"
        )
    return ""


async def restore(url: str, seen: Seen) -> list[Path]:
    """Write what was seen last into the database; returns where damaged files were put.

    Conflict where another registry is in use; RegistryDown where the database takes nothing.
    """
    database = Database(url)
    if database.file is not None:
        database.close()
        return await _restore_file(database.file, seen)
    try:
        await database.write(lambda c: _fill(c, seen))
    finally:
        database.close()
    return []


def _look(connection: Connection, name: str) -> Found:
    if not schema.is_one(connection):
        return Found(name, fault="it is a database without a registry")
    schema.check_pages(connection)
    snapshot = queries.snapshot(connection)
    events = connection.execute(select(func.count()).select_from(schema.history)).scalar_one()
    identity, aliases = schema.identity_of(connection), tuple(sorted(snapshot.aliases))
    return Found(name, identity, snapshot.revision, aliases, int(events))


async def _restore_file(file: Path, seen: Seen) -> list[Path]:
    fresh = file.with_name(f".{file.name}.restored")
    for end in BESIDE:
        fresh.with_name(fresh.name + end).unlink(missing_ok=True)
    database = Database(f"sqlite:///{fresh}")
    try:
        await database.write(lambda c: _fill(c, seen))
    finally:
        database.close()
    kept = []
    for end in BESIDE:
        damaged = file.with_name(file.name + end)
        if damaged.exists():
            kept.append(damaged.with_name(f"{file.name}.damaged-{int(time.time())}{end}"))
            damaged.rename(kept[-1])
    os.replace(fresh, file)
    settle(file.parent)
    return kept


def _fill(connection: Connection, seen: Seen) -> None:
    """A registry with the identity and the rows that were seen, one revision later."""
    other = schema.is_one(connection) and schema.identity_of(connection) != seen.identity
    if other and queries.snapshot(connection).aliases:
        raise Conflict(
            "the database holds another registry that is in use: give --database-url an empty one"
        )
    schema.tables.drop_all(connection)
    schema.prepare(connection)
    snapshot = seen.snapshot
    if seen.identity:
        connection.execute(update(schema.identity).values(identity=seen.identity))
    connection.execute(update(schema.registry).values(revision=snapshot.revision + 1))
    for record in snapshot.records.values():
        queries.add_record(connection, record)
    for row in snapshot.aliases.values():
        queries.write_alias(connection, row.alias, row)
        told = Event(row.alias, ACTION, WHO, after=row.stable)
        queries.add_event(connection, told, "operator")
