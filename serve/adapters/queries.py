"""The registry's statements, each a function of an open transaction."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import Connection, delete, insert, select, text, update

from serve.adapters import schema
from serve.adapters.database import REMEDY
from serve.adapters.rows import ALIAS, RECORD, Alias, Event, Record, Snapshot, State
from serve.errors import RegistryDown

T = TypeVar("T")

EVENTS_KEPT = 1000  # of each alias
REPLICA_FORGOTTEN_S = 3600.0  # unseen for so long, a replica is gone, and what it said


def revision(connection: Connection) -> int:
    return int(connection.execute(select(schema.registry.c.revision)).scalar_one())


def raise_revision(connection: Connection) -> int:
    """The new revision. Its row's lock also puts PostgreSQL's writers in a line."""
    counter = schema.registry
    raised = update(counter).values(revision=counter.c.revision + 1).returning(counter.c.revision)
    return int(connection.execute(raised).scalar_one())


def snapshot(connection: Connection) -> Snapshot:
    """Revision first: rows that are newer than it are seen again, rows that are older never."""
    seen = revision(connection)
    aliases = {a.alias: a for a in map(_to_alias, connection.execute(select(schema.aliases)))}
    found = map(_to_record, connection.execute(select(schema.versions)))
    return Snapshot(seen, aliases, {(r.alias, r.digest): r for r in found})


def alias(connection: Connection, name: str) -> Alias | None:
    row = connection.execute(select(schema.aliases).where(schema.aliases.c.alias == name)).first()
    return _to_alias(row) if row else None


def write_alias(connection: Connection, name: str, row: Alias | None) -> None:
    """Replace the row, or delete it."""
    connection.execute(delete(schema.aliases).where(schema.aliases.c.alias == name))
    if row is not None:
        connection.execute(insert(schema.aliases).values(asdict(row)))


def records(connection: Connection, name: str) -> list[Record]:
    """Versions of an alias, newest first."""
    table = schema.versions
    asked = select(table).where(table.c.alias == name).order_by(table.c.made_at.desc())
    return [_to_record(row) for row in connection.execute(asked)]


def add_record(connection: Connection, record: Record) -> None:
    """A version that is there already keeps its first source unless it is given anew."""
    table = schema.versions
    same = (table.c.alias == record.alias) & (table.c.digest == record.digest)
    connection.execute(delete(table).where(same))
    connection.execute(insert(table).values(asdict(record)))


def prune(connection: Connection, name: str, row: Alias | None, keep: int) -> None:
    """Forget versions of an alias but the `keep` newest and what it names, and old history."""
    past = schema.history
    ids = select(past.c.id).where(past.c.alias == name).order_by(past.c.id.desc())
    oldest = connection.execute(ids.offset(EVENTS_KEPT).limit(1)).scalar()
    if oldest is not None:
        connection.execute(delete(past).where(past.c.alias == name, past.c.id <= oldest))
    named = {row.stable, row.previous, row.canary} if row else set()
    table = schema.versions
    for record in records(connection, name)[keep:]:
        if record.digest not in named:
            same = (table.c.alias == name) & (table.c.digest == record.digest)
            connection.execute(delete(table).where(same))


def add_event(connection: Connection, told: Event, replica: str) -> None:
    row = {**asdict(told), "at": now(connection), "replica": replica}
    connection.execute(insert(schema.history).values(row))


def events(connection: Connection, name: str, limit: int) -> list[dict[str, Any]]:
    """Newest first."""
    table = schema.history
    asked = select(table).where(table.c.alias == name).order_by(table.c.id.desc()).limit(limit)
    return [dict(row._mapping) for row in connection.execute(asked)]


def states(connection: Connection, name: str) -> list[dict[str, Any]]:
    """What each replica says of an alias."""
    table = schema.states
    order = (table.c.replica, table.c.digest)
    asked = select(table).where(table.c.alias == name).order_by(*order)
    return [dict(row._mapping) for row in connection.execute(asked)]


def report(connection: Connection, replica: str, told: Iterable[State]) -> set[str]:
    """Replace what a replica says; the digests that any replica or version still needs."""
    at = now(connection)
    seen, said = schema.replicas, schema.states
    gone = select(seen.c.replica).where(seen.c.seen_at < at - REPLICA_FORGOTTEN_S)
    connection.execute(delete(said).where(said.c.replica.in_(gone)))
    connection.execute(delete(seen).where(seen.c.seen_at < at - REPLICA_FORGOTTEN_S))
    connection.execute(delete(seen).where(seen.c.replica == replica))
    connection.execute(insert(seen).values(replica=replica, seen_at=at))
    connection.execute(delete(said).where(said.c.replica == replica))
    for state in told:
        connection.execute(insert(said).values({**asdict(state), "replica": replica, "at": at}))
    named = select(schema.versions.c.digest).union(select(said.c.digest))
    return set(connection.execute(named).scalars())


def now(connection: Connection) -> float:
    """Seconds since 1970 by the database's clock where it has one: replicas' clocks differ."""
    if connection.dialect.name == "postgresql":
        told = connection.execute(text("SELECT extract(epoch FROM clock_timestamp())"))
        return float(told.scalar_one())
    return time.time()


def _to_alias(row: Any) -> Alias:
    return _checked(ALIAS, row)


def _to_record(row: Any) -> Record:
    return _checked(RECORD, row)


def _checked(kind: TypeAdapter[T], row: Any) -> T:
    """RegistryDown for what no release of ours has written: SQLite takes any value anywhere."""
    try:
        return kind.validate_python(dict(row._mapping))
    except ValidationError as fault:
        first = fault.errors(include_url=False)[0]
        where = f"{first['loc'][0]}: {first['msg']}" if first["loc"] else first["msg"]
        raise RegistryDown(f"the adapter registry holds a damaged row ({where}): {REMEDY}") from (
            fault
        )
