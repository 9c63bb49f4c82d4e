"""The registry's tables, and the steps that brought them here.

`quantserve_identity` holds what tells this registry from every other: whoever has seen it knows a
new, another or an emptied database by it, and changes nothing there. One row of
`quantserve_registry` holds the number of steps taken and the revision, which every change raises: a
replica that sees the same revision has nothing to do. A database with more steps than are known
here was made by a newer release and is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from uuid import uuid4

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    insert,
    inspect,
    select,
    text,
    update,
)

from serve.adapters.database import REMEDY
from serve.errors import RegistryDown, SettingsError

ADVISORY_LOCK = 0x7175616E74  # "quant": PostgreSQL's lock while a replica prepares the schema

tables = MetaData()

registry = Table(
    "quantserve_registry",
    tables,
    Column("id", Integer, primary_key=True),
    Column("steps", Integer, nullable=False),
    Column("revision", BigInteger, nullable=False),
)
identity = Table(
    "quantserve_identity",
    tables,
    Column("id", Integer, primary_key=True),
    Column("identity", String(32), nullable=False),
)
# What an alias should be: digests of its versions, and the share of traffic of the canary.
aliases = Table(
    "quantserve_aliases",
    tables,
    Column("alias", String(255), primary_key=True),
    Column("stable", String(64), nullable=False),
    Column("previous", String(64)),
    Column("canary", String(64)),
    Column("weight", Float, nullable=False),
    Column("pinned", Boolean, nullable=False),
    Column("revision", BigInteger, nullable=False),
)
# Never changed: an alias, a digest, and where its bytes were found.
versions = Table(
    "quantserve_versions",
    tables,
    Column("alias", String(255), primary_key=True),
    Column("digest", String(64), primary_key=True),
    Column("source", Text, nullable=False),
    Column("rank", Integer, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("made_at", Float, nullable=False),
    Column("made_by", String(255), nullable=False),
)
history = Table(
    "quantserve_history",
    tables,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("at", Float, nullable=False),
    Column("alias", String(255), nullable=False, index=True),
    Column("action", String(32), nullable=False),
    Column("who", String(255), nullable=False),
    Column("replica", String(255), nullable=False),
    Column("before", String(64)),
    Column("after", String(64)),
    Column("weight", Float),
    Column("result", String(32), nullable=False),
    Column("reason", Text),
)
# What each replica made of it.
replicas = Table(
    "quantserve_replicas",
    tables,
    Column("replica", String(255), primary_key=True),
    Column("seen_at", Float, nullable=False),
)
states = Table(
    "quantserve_states",
    tables,
    Column("replica", String(255), primary_key=True),
    Column("alias", String(255), primary_key=True),
    Column("digest", String(64), primary_key=True),
    Column("state", String(32), nullable=False),
    Column("reason", Text),
    Column("at", Float, nullable=False),
)


def _first(connection: Connection) -> None:
    tables.create_all(connection)


def _second(connection: Connection) -> None:
    identity.create(connection, checkfirst=True)
    connection.execute(insert(identity).values(id=1, identity=uuid4().hex))


# Step by step, oldest first; a released step is never edited, only followed by another.
STEPS: tuple[Callable[[Connection], None], ...] = (_first, _second)


def prepare(connection: Connection, known: str | None = None) -> str:
    """Take the steps that this database lacks, in one transaction, one replica at a time.

    Returns its identity. RegistryDown, and nothing is written, when it should be `known` (as in
    `confirm`) and is not; SettingsError when it has steps that are unknown here.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})"))
    check_pages(connection)
    if known is not None:
        confirm(connection, known)
    registry.create(connection, checkfirst=True)
    taken = connection.execute(select(registry.c.steps)).scalar()
    if taken is None:
        connection.execute(insert(registry).values(id=1, steps=0, revision=0))
        taken = 0
    if taken > len(STEPS):
        raise SettingsError(
            f"the registry was made by a newer quantserve: {taken} schema steps, "
            f"{len(STEPS)} are known here; upgrade this server or give it another database"
        )
    for step in STEPS[taken:]:
        step(connection)
    connection.execute(update(registry).values(steps=len(STEPS)))
    return str(identity_of(connection))


def identity_of(connection: Connection) -> str | None:
    """None for a database that is no registry, or of a release that gave it none."""
    if not inspect(connection).has_table(identity.name):
        return None
    return connection.execute(select(identity.c.identity)).scalar()


def is_one(connection: Connection) -> bool:
    """Whether there has been a registry here."""
    return inspect(connection).has_table(registry.name)


def confirm(connection: Connection, known: str) -> None:
    """RegistryDown when this is not the registry that was known; "": of a release without names."""
    found = identity_of(connection)
    if found == known or (not known and is_one(connection)):
        return
    there = f"another one ({found[:8]})" if found else "none"
    raise RegistryDown(
        f"where the adapter registry {known[:8]} was, there is {there} now: {REMEDY}"
    )


def check_pages(connection: Connection) -> None:
    """RegistryDown for a SQLite file with damage that no statement of ours may meet for weeks."""
    if connection.dialect.name != "sqlite":
        return
    found = str(connection.exec_driver_sql("PRAGMA quick_check(1)").scalar())
    if found != "ok":
        told = " ".join(found.split())
        raise RegistryDown(f"the adapter registry is damaged ({told}): {REMEDY}")
