"""The registry on SQLite and on PostgreSQL: what is written together, and what two writers see."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Connection, text

from serve.adapters import schema
from serve.adapters.database import Database
from serve.adapters.registry import Registry
from serve.adapters.rows import Alias, Event, Record, State
from serve.errors import Conflict, RegistryDown, SettingsError

A, B, C, D, E = (letter * 64 for letter in "abcde")


@pytest.fixture
async def registry(database_url: str) -> AsyncIterator[Registry]:
    made = Registry(database_url, "one", keep=3)
    await made.prepare()
    yield made
    made.close()


@pytest.fixture
async def other(database_url: str, registry: Registry) -> AsyncIterator[Registry]:
    """Another replica's view of the same database."""
    made = Registry(database_url, "two", keep=3)
    await made.prepare()
    yield made
    made.close()


async def put(registry: Registry, alias: str, digest: str) -> Alias:
    def edit(row: Alias | None) -> Alias:
        if row is None:
            return Alias(alias, digest)
        return replace(row, stable=digest, previous=row.stable)

    record = Record(alias, digest, f"/adapters/{digest[:1]}", 8, 100, float(ord(digest[0])), "me")
    row, revision = await registry.change(edit, Event(alias, "put", "me", after=digest), record)
    assert row is not None and row.revision == revision
    return row


async def test_an_empty_database_is_prepared_and_empty(registry: Registry) -> None:
    snapshot = await registry.snapshot()
    assert (snapshot.revision, snapshot.aliases, snapshot.records) == (0, {}, {})


async def test_a_change_is_seen_by_another_replica_with_its_version(
    registry: Registry, other: Registry
) -> None:
    row = await put(registry, "legal", A)
    assert await other.revision() == row.revision == 1
    snapshot = await other.snapshot()
    assert snapshot.aliases == {"legal": row}
    assert snapshot.records["legal", A].source == "/adapters/a"


async def test_an_edit_that_refuses_leaves_no_trace(registry: Registry) -> None:
    await put(registry, "legal", A)

    def refuse(row: Alias | None) -> Alias:
        raise Conflict("no")

    with pytest.raises(Conflict):
        await registry.change(
            refuse, Event("legal", "put", "me"), Record("legal", B, "", 1, 1, 0, "")
        )
    assert await registry.revision() == 1
    assert len(await registry.history("legal", 10)) == len(await registry.records("legal")) == 1


async def test_two_replicas_at_once_take_turns_and_lose_nothing(
    registry: Registry, other: Registry
) -> None:
    def pin(row: Alias | None) -> Alias:
        return replace(row or Alias("legal", A), weight=(row.weight if row else 0.0) + 1)

    changes = [
        each.change(pin, Event("legal", "put", "me"))
        for _ in range(10)
        for each in (registry, other)
    ]
    rows = await asyncio.gather(*changes)
    assert sorted(revision for _, revision in rows) == list(range(1, 21))
    row = await registry.alias("legal")
    assert row is not None and row.weight == 20.0


async def test_history_tells_who_did_what_and_what_came_of_it(
    registry: Registry, other: Registry
) -> None:
    await put(registry, "legal", A)
    await other.tell(Event("legal", "put", "ops", result="refused", reason="rank 99"))
    refused, made = await registry.history("legal", 10)
    assert (refused["who"], refused["result"], refused["reason"]) == ("ops", "refused", "rank 99")
    assert (made["who"], made["replica"], made["after"]) == ("me", "one", A)
    assert refused["replica"] == "two"
    assert len(await registry.history("legal", 1)) == 1
    assert await registry.history("ghost", 10) == []


async def test_old_versions_go_but_what_an_alias_names_stays(registry: Registry) -> None:
    for digest in (A, B, C, D, E):
        await put(registry, "legal", digest)

    def back(row: Alias | None) -> Alias:
        assert row is not None
        return replace(row, stable=C, previous=E, canary=D)

    assert [r.digest for r in await registry.records("legal")] == [E, D, C]
    await registry.change(back, Event("legal", "rollback", "me"))
    await put(registry, "legal", "f" * 64)
    assert {r.digest[0] for r in await registry.records("legal")} == {"f", "e", "d", "c"}


async def test_a_deleted_alias_can_still_be_looked_up_in_history(registry: Registry) -> None:
    await put(registry, "legal", A)
    await registry.change(lambda _: None, Event("legal", "delete", "me", before=A))
    assert await registry.alias("legal") is None
    assert [row["action"] for row in await registry.history("legal", 5)] == ["delete", "put"]
    assert [r.digest for r in await registry.records("legal")] == [A]  # it can be brought back


async def test_what_a_replica_says_replaces_what_it_said(
    registry: Registry, other: Registry
) -> None:
    await registry.report([State("legal", A, "serving"), State("legal", B, "failed", "no file")])
    await other.report([State("legal", C, "retiring")])
    await registry.report([State("legal", A, "serving")])
    told = [(s["replica"], s["digest"], s["state"]) for s in await other.states("legal")]
    assert told == [("one", A, "serving"), ("two", C, "retiring")]


async def test_a_digest_is_needed_while_any_version_or_replica_names_it(
    registry: Registry, other: Registry
) -> None:
    await put(registry, "legal", A)
    await other.report([State("gone", B, "retiring")])
    assert await registry.report([State("legal", C, "failed", "x")]) == {A, B, C}


async def test_a_replica_that_was_not_seen_for_long_is_forgotten(
    registry: Registry, other: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    await other.report([State("legal", B, "serving")])
    monkeypatch.setattr("serve.adapters.queries.REPLICA_FORGOTTEN_S", -1.0)
    await registry.report([])
    assert await registry.states("legal") == []


async def test_replicas_that_start_together_prepare_once(database_url: str) -> None:
    made = [Registry(database_url, f"r{n}", keep=3) for n in range(4)]
    await asyncio.gather(*(each.prepare() for each in made))
    assert await made[0].revision() == 0
    for each in made:
        each.close()


async def test_replicas_that_open_a_new_file_at_once_all_get_it(tmp_path: Path) -> None:
    for place in range(20):  # one in a hundred was told that the file is locked
        url = f"sqlite:///{tmp_path / f'{place}.sqlite'}"
        made = [Registry(url, f"r{n}", keep=3) for n in range(8)]
        await asyncio.gather(*(each.prepare() for each in made))
        assert [await each.revision() for each in made] == [0] * 8
        for each in made:
            each.close()


async def test_a_schema_step_is_taken_once_and_keeps_the_rows(
    registry: Registry, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put(registry, "legal", A)

    def second(connection: Connection) -> None:
        connection.execute(text("ALTER TABLE quantserve_aliases ADD COLUMN note VARCHAR(10)"))

    monkeypatch.setattr(schema, "STEPS", (*schema.STEPS, second))
    database = Database(database_url)
    for _ in range(2):
        await database.write(schema.prepare)
    noted = await database.read(
        lambda c: c.execute(text("SELECT alias, note FROM quantserve_aliases")).all()
    )
    assert [tuple(row) for row in noted] == [("legal", None)]
    database.close()


async def test_a_step_that_fails_leaves_the_database_as_it_was(
    registry: Registry, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(connection: Connection) -> None:
        connection.execute(text("CREATE TABLE quantserve_half (x INTEGER)"))
        raise SettingsError("half way")

    stock = schema.STEPS
    monkeypatch.setattr(schema, "STEPS", (*stock, broken))
    database = Database(database_url)
    with pytest.raises(SettingsError, match="half way"):
        await database.write(schema.prepare)
    monkeypatch.setattr(schema, "STEPS", stock)
    await database.write(schema.prepare)
    await put(registry, "legal", A)
    database.close()


async def test_a_newer_database_is_refused(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "STEPS", ())
    with pytest.raises(SettingsError, match="newer quantserve"):
        await registry.prepare()


async def test_a_newer_database_is_no_answer_to_who_asks_it(
    database_url: str, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a rolled back upgrade: what was last seen can be served, and nothing is changed."""
    monkeypatch.setattr(schema, "STEPS", ())
    again = Registry(database_url, "again", keep=3)
    with pytest.raises(RegistryDown, match="newer quantserve"):
        await again.snapshot()
    again.close()


async def test_history_is_bounded(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.adapters.queries.EVENTS_KEPT", 3)
    for digest in (A, B, C, D, E):
        await put(registry, "legal", digest)
        await put(registry, "chat", digest)
    rows = await registry.history("legal", 50)
    assert [row["after"] for row in rows] == [E, D, C, B]  # the newest is told after the pruning
