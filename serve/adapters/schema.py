"""The registry's tables, and the steps that brought them here.

One row of `quantserve_registry` holds the number of steps taken and the revision, which every
change raises: a replica that sees the same revision has nothing to do. A database with more steps
than are known here was made by a newer release and is refused.
"""

from __future__ import annotations

from collections.abc import Callable

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
    select,
    text,
    update,
)

from serve.errors import SettingsError

ADVISORY_LOCK = 0x7175616E74  # "quant": PostgreSQL's lock while a replica prepares the schema

tables = MetaData()

registry = Table(
    "quantserve_registry",
    tables,
    Column("id", Integer, primary_key=True),
    Column("steps", Integer, nullable=False),
    Column("revision", BigInteger, nullable=False),
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


# Step by step, oldest first; a released step is never edited, only followed by another.
STEPS: tuple[Callable[[Connection], None], ...] = (_first,)


def prepare(connection: Connection) -> None:
    """Take the steps that this database lacks, in one transaction, one replica at a time.

    SettingsError when it has steps that are unknown here.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})"))
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
