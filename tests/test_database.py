"""Opening a database by URL, and what its silence is called."""

from __future__ import annotations

import asyncio
import socket
import sqlite3
import time
from pathlib import Path

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.exc import IntegrityError, InvalidRequestError, ProgrammingError

from serve.adapters import database as module
from serve.adapters.database import Database, checked
from serve.errors import RegistryDown, SettingsError
from tests.postgres import Postgres


def one(connection: Connection) -> int:
    return int(connection.execute(text("SELECT 1")).scalar_one())


@pytest.mark.parametrize("url", ["mysql://h/d", "nonsense", "", "redis://x"])
def test_a_url_that_is_neither_is_refused_with_examples(url: str) -> None:
    with pytest.raises(SettingsError, match="database_url"):
        checked(url)


@pytest.mark.parametrize("url", ["postgresql://u@h/d", "postgres://u@h/d"])
def test_postgresql_is_spoken_to_through_psycopg(url: str) -> None:
    assert checked(url).drivername == "postgresql+psycopg"


async def test_a_folder_that_does_not_exist_is_made_for_sqlite(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/new/registry.sqlite")
    assert await database.read(one) == 1
    mode = await database.read(lambda c: c.execute(text("PRAGMA journal_mode")).scalar())
    assert mode == "wal"
    database.close()


async def test_a_file_that_cannot_be_written_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a lock is waited for."""
    monkeypatch.setattr(module, "SQLITE_RETRY_S", 60.0)
    file = tmp_path / "registry.sqlite"
    sqlite3.connect(file).execute("CREATE TABLE t (c)").connection.close()
    database = Database(f"sqlite:///file:{file}?mode=ro&uri=true")
    with pytest.raises(RegistryDown, match="readonly"):
        await database.read(one)
    database.close()


async def test_nobody_listening_is_registry_down() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    database = Database(f"postgresql://u@127.0.0.1:{port}/d")
    with pytest.raises(RegistryDown) as refusal:
        await database.read(one)
    assert refusal.value.status == 503
    database.close()


async def test_a_database_that_hangs_is_given_up_and_the_loop_never_waits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "ANSWER_TIMEOUT_S", 0.1)
    database = Database(f"sqlite:///{tmp_path}/registry.sqlite")
    ran: list[str] = []

    def hang(connection: Connection) -> None:
        time.sleep(0.4)

    def late(connection: Connection) -> None:
        ran.append("late")

    beats = 0
    hanging = [asyncio.create_task(database.write(work)) for work in (hang, late)]
    while not all(task.done() for task in hanging):
        beats += 1
        await asyncio.sleep(0.01)
    assert beats > 5
    for task in hanging:
        with pytest.raises(RegistryDown, match="not answered"):
            task.result()
    await asyncio.sleep(0.5)
    assert ran == []  # its caller was told that nothing happened
    database.close()


async def test_what_ends_too_late_to_be_told_is_taken_back(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its statements each kept their time; all of them did not."""
    database = Database(database_url)
    await database.write(lambda c: c.execute(text("CREATE TABLE t (x INTEGER)")))
    monkeypatch.setattr(module, "COMMIT_S", module.ANSWER_TIMEOUT_S)
    monkeypatch.setattr(module, "ANSWER_TIMEOUT_S", 4.0)

    def slow(connection: Connection) -> None:
        connection.execute(text("INSERT INTO t VALUES (1)"))
        time.sleep(2.5)

    with pytest.raises(RegistryDown, match="not answered"):
        await database.write(slow)
    counted = text("SELECT count(*) FROM t")
    assert await database.read(lambda c: c.execute(counted).scalar()) == 0
    database.close()


@pytest.mark.parametrize(
    "fault",
    [
        IntegrityError("INSERT", {}, sqlite3.IntegrityError("UNIQUE")),
        ProgrammingError("SELECT", {}, sqlite3.ProgrammingError("no such table")),
        InvalidRequestError("half a row"),
        sqlite3.DatabaseError("file is not a database"),
        OSError(28, "No space left on device"),
    ],
    ids=lambda fault: type(fault).__name__,
)
async def test_every_fault_of_a_database_has_one_name(tmp_path: Path, fault: Exception) -> None:
    database = Database(f"sqlite:///{tmp_path}/registry.sqlite")

    def broken(_: Connection) -> None:
        raise fault

    for asked in (database.read, database.write):
        with pytest.raises(RegistryDown) as refusal:
            await asked(broken)
        assert refusal.value.__cause__ is fault
    database.close()


async def test_a_folder_that_cannot_be_made_is_no_reason_not_to_start(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"")
    database = Database(f"sqlite:///{tmp_path}/state/registry.sqlite")
    with pytest.raises(RegistryDown, match=r"File exists|Not a directory"):
        await database.read(one)
    database.close()


async def test_a_restarted_postgresql_is_found_again(postgres: Postgres) -> None:
    database = Database(postgres.fresh())
    assert await database.read(one) == 1
    postgres.stop()
    try:
        with pytest.raises(RegistryDown):
            await database.read(one)
    finally:
        postgres.start()
    assert await database.read(one) == 1
    database.close()


async def test_a_locked_row_is_not_waited_for_for_ever(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = postgres.fresh()
    monkeypatch.setitem(module.POSTGRES, "options", "-c lock_timeout=100")
    one_side, other_side = Database(url), Database(url)
    await one_side.write(lambda c: c.execute(text("CREATE TABLE t AS SELECT 1 AS x")))

    def slow(connection: Connection) -> None:
        connection.execute(text("UPDATE t SET x = 2"))
        connection.execute(text("SELECT pg_sleep(1)"))

    holding = asyncio.create_task(one_side.write(slow))
    await asyncio.sleep(0.3)
    with pytest.raises(RegistryDown, match="lock timeout"):
        await other_side.write(lambda c: c.execute(text("UPDATE t SET x = 3")))
    await holding
    for database in (one_side, other_side):
        database.close()
