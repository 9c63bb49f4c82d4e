"""A registry that is damaged, gone, emptied or another: told from a new one, and not written to."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from sqlalchemy import text

from serve.adapters import last_seen, restoration
from serve.adapters.database import Database
from serve.errors import Conflict, RegistryDown
from tests.fakes import BY, Replica, replica
from tests.postgres import Postgres

Damage = Callable[[Path], object]


def garble(file: Path) -> None:
    file.write_bytes(os.urandom(file.stat().st_size))


def spoil_header(file: Path) -> None:
    with file.open("r+b") as raw:
        raw.write(b"\x01" * 32)


def zero_pages(file: Path) -> None:
    size = file.stat().st_size
    with file.open("r+b") as raw:
        raw.seek(4096)
        raw.write(bytes(size - 4096))


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def cut_oddly(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 777)


def replace(file: Path) -> None:
    file.unlink()
    sqlite3.connect(file).execute("CREATE TABLE t (c)").connection.close()


def make_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: list[Damage] = [
    Path.unlink, garble, spoil_header, zero_pages, cut, cut_oddly, replace, make_folder,
    lambda file: file.write_bytes(b""),
    lambda file: file.write_bytes(bytes(8192)),
]  # fmt: skip
NAMES = ["gone", "garbage", "header", "pages", "half", "odd", "other", "folder", "empty", "zeros"]


def contents(folder: Path) -> dict[str, bytes]:
    """What lies there and must not be touched; a folder is b""."""
    files = sorted(folder.glob("registry*"))
    return {file.name: file.read_bytes() if file.is_file() else b"" for file in files}


@pytest.fixture
async def one(tmp_path: Path, folders: list[Path]) -> AsyncIterator[Replica]:
    """A replica that has put an alias into a SQLite file beside its cache, and has seen it."""
    made = started_in(tmp_path / "state")
    assert await made.reconciler.start(0.01)
    await made.catalog.put("legal", str(folders[0]), BY)
    assert await made.reconciler.turn()
    yield made
    made.registry.close()


def started_in(state: Path) -> Replica:
    return replica(state, f"sqlite:///{state}/registry.sqlite")


@pytest.mark.parametrize("damage", DAMAGES, ids=NAMES)
async def test_a_start_serves_what_was_last_seen_and_changes_nothing(
    one: Replica, tmp_path: Path, folders: list[Path], damage: Damage
) -> None:
    one.registry.close()
    damage(tmp_path / "state" / "registry.sqlite")
    before = contents(tmp_path / "state")
    again = started_in(tmp_path / "state")
    assert not await again.reconciler.start(0.01)
    assert again.published() == one.published() != {}
    assert again.metrics.registry_up._value.get() == 0
    with pytest.raises(RegistryDown, match=r"quantserve registry|unable to open|not answer"):
        await again.catalog.put("chat", str(folders[1]), BY)
    assert not await again.reconciler.turn()
    assert again.published() == one.published()
    assert contents(tmp_path / "state") == before
    again.registry.close()


@pytest.mark.parametrize("damage", DAMAGES, ids=NAMES)
async def test_a_change_is_not_acknowledged_into_what_is_lost_while_it_runs(
    one: Replica, tmp_path: Path, folders: list[Path], damage: Damage
) -> None:
    damage(tmp_path / "state" / "registry.sqlite")
    before = contents(tmp_path / "state")
    with pytest.raises(RegistryDown) as refusal:
        await one.catalog.put("chat", str(folders[1]), BY)
    assert refusal.value.status == 503
    assert not await one.reconciler.turn()
    assert set(one.published()) == {"legal"} and one.metrics.registry_up._value.get() == 0
    assert contents(tmp_path / "state") == before


@pytest.mark.parametrize("damage", DAMAGES, ids=NAMES)
async def test_what_was_last_seen_is_restored_and_a_running_server_goes_on_with_it(
    one: Replica, tmp_path: Path, folders: list[Path], damage: Damage
) -> None:
    state = tmp_path / "state"
    url, seen = f"sqlite:///{state}/registry.sqlite", last_seen.read(state / last_seen.NAME)
    assert seen is not None and not restoration.differs(await restoration.look(url), seen)
    damage(state / "registry.sqlite")
    there = (state / "registry.sqlite").exists()
    assert not await one.reconciler.turn()
    assert restoration.differs(await restoration.look(url), seen)
    kept = await restoration.restore(url, seen)
    assert len(kept) == there and all("damaged-" in file.name for file in kept)
    found = await restoration.look(url)
    assert not restoration.differs(found, seen) and found.aliases == ("legal",)
    assert await one.reconciler.turn()
    await one.catalog.put("chat", str(folders[1]), BY)
    assert set(one.published()) == {"legal", "chat"}
    actions = [row["action"] for row in await one.registry.history("legal", 5)]
    assert actions == ["restore"]


async def test_an_emptied_registry_is_no_new_one(one: Replica, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with sqlite3.connect(state / "registry.sqlite") as theirs:
        theirs.execute("DELETE FROM quantserve_aliases")
    again = started_in(state)
    assert not await again.reconciler.start(0.01)
    assert again.published() == one.published() != {}
    url, seen = f"sqlite:///{state}/registry.sqlite", last_seen.read(state / last_seen.NAME)
    assert "0 aliases" in restoration.differs(await restoration.look(url), seen)
    again.registry.close()


async def test_a_registry_of_a_release_without_identities_gets_one(
    one: Replica, tmp_path: Path
) -> None:
    """And a cache of that release is no reason to take a new database for the old one."""
    state = tmp_path / "state"
    one.registry.close()
    with sqlite3.connect(state / "registry.sqlite") as theirs:
        theirs.execute("DROP TABLE quantserve_identity")
        theirs.execute("UPDATE quantserve_registry SET steps = 1")
    seen = last_seen.read(state / last_seen.NAME)
    assert seen is not None
    last_seen.write(state / last_seen.NAME, last_seen.Seen("", seen.snapshot))
    again = started_in(state)
    assert await again.reconciler.start(0.01)
    assert again.published() == one.published()
    known = last_seen.read(state / last_seen.NAME)
    assert known is not None and known.identity == again.registry.identity
    again.registry.close()
    last_seen.write(state / last_seen.NAME, last_seen.Seen("", seen.snapshot))
    (state / "registry.sqlite").unlink()
    third = started_in(state)
    assert not await third.reconciler.start(0.01)
    assert third.published() == one.published()
    assert not (state / "registry.sqlite").exists()
    third.registry.close()


async def test_a_damaged_row_is_a_damaged_registry(one: Replica, tmp_path: Path) -> None:
    """A digest becomes a folder's name."""
    with sqlite3.connect(tmp_path / "state" / "registry.sqlite") as theirs:
        theirs.execute("UPDATE quantserve_aliases SET stable = '../../../tmp'")
        theirs.execute("UPDATE quantserve_registry SET revision = revision + 1")
    assert not await one.reconciler.turn()
    assert set(one.published()) == {"legal"}


async def test_an_older_copy_of_the_registry_is_followed(
    one: Replica, tmp_path: Path, folders: list[Path]
) -> None:
    """An operator's backup: it has the identity."""
    state = tmp_path / "state"
    backup = (state / "registry.sqlite").read_bytes()
    await one.catalog.put("chat", str(folders[1]), BY)
    await one.reconciler.turn()
    (state / "registry.sqlite").write_bytes(backup)
    assert await one.reconciler.turn()
    assert set(one.published()) == {"legal"}


async def test_a_damaged_cache_is_kept_aside_and_written_anew(one: Replica, tmp_path: Path) -> None:
    cache = tmp_path / "state" / last_seen.NAME
    cache.write_bytes(b"{")
    again = started_in(tmp_path / "state")
    assert await again.reconciler.start(0.01)
    assert last_seen.read(cache) is not None
    assert b"{" in contents(tmp_path / "state").values()
    again.registry.close()


class TestPostgres:
    """The same of a database elsewhere: dropped, emptied, or another one behind the URL."""

    @pytest.mark.parametrize(
        "loss",
        [
            "DROP TABLE quantserve_registry, quantserve_identity, quantserve_aliases, "
            "quantserve_versions, quantserve_history, quantserve_replicas, quantserve_states",
            "TRUNCATE quantserve_registry, quantserve_identity, quantserve_aliases, "
            "quantserve_versions, quantserve_history",
            "UPDATE quantserve_identity SET identity = 'another'",
            "DROP TABLE quantserve_aliases",
        ],
        ids=["dropped", "emptied", "another", "table"],
    )
    async def test_what_is_lost_there_is_not_written_to(
        self, postgres: Postgres, tmp_path: Path, folders: list[Path], loss: str
    ) -> None:
        url = postgres.fresh()
        one = replica(tmp_path / "state", url)
        assert await one.reconciler.start(0.01)
        await one.catalog.put("legal", str(folders[0]), BY)
        assert await one.reconciler.turn()
        database = Database(url)
        await database.write(lambda c: c.execute(text(loss)))
        again = replica(tmp_path / "state", url)
        for each in (one, again):
            with pytest.raises(RegistryDown):
                await each.catalog.put("chat", str(folders[1]), BY)
        assert not await again.reconciler.start(0.01)
        assert again.published() == one.published() != {}
        for each in (one, again):
            each.registry.close()
        database.close()

    async def test_a_new_database_is_filled_from_what_was_last_seen(
        self, postgres: Postgres, tmp_path: Path, folders: list[Path]
    ) -> None:
        one = replica(tmp_path / "state", postgres.fresh())
        await one.reconciler.start(0.01)
        await one.catalog.put("legal", str(folders[0]), BY)
        await one.reconciler.turn()
        seen, url = last_seen.read(tmp_path / "state" / last_seen.NAME), postgres.fresh()
        assert seen is not None and await restoration.restore(url, seen) == []
        moved = replica(tmp_path / "state", url)
        assert await moved.reconciler.start(0.01)
        assert moved.published() == one.published()
        for each in (one, moved):
            each.registry.close()

    async def test_a_registry_in_use_is_not_overwritten(
        self, postgres: Postgres, tmp_path: Path, folders: list[Path]
    ) -> None:
        every = [replica(tmp_path / name, postgres.fresh(), name=name) for name in ("a", "b")]
        urls = [each.registry._database.name for each in every]
        for each in every:
            await each.reconciler.start(0.01)
            await each.catalog.put("legal", str(folders[0]), BY)
            await each.reconciler.turn()
        seen = last_seen.read(tmp_path / "a" / last_seen.NAME)
        assert seen is not None
        with pytest.raises(Conflict, match="in use"):
            await restoration.restore(urls[1], seen)
        assert await every[1].reconciler.turn()
        for each in every:
            each.registry.close()
