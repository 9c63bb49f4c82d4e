"""Changes: what each does to the alias, to the history, and to who comes second."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from serve.adapters.catalog import By
from serve.errors import (
    AdapterRefused,
    BadRequest,
    Conflict,
    NotFound,
    PreconditionFailed,
    RegistryDown,
    ServeError,
    StoreFailed,
)
from tests.fakes import BY, MODULE, SHAPES, EngineRefused, Replica, replica, settled
from tests.lora import write_lora
from tests.postgres import Postgres


@pytest.fixture
async def one(tmp_path: Path, database_url: str) -> AsyncIterator[Replica]:
    made = replica(tmp_path / "one", database_url)
    await made.reconciler.start(0.01)
    yield made
    made.registry.close()


@pytest.fixture
async def two(tmp_path: Path, database_url: str) -> AsyncIterator[Replica]:
    made = replica(tmp_path / "two", database_url, name="two")
    await made.reconciler.start(0.01)
    yield made
    made.registry.close()


@pytest.fixture
def loras(tmp_path: Path) -> list[str]:
    return [str(write_lora(tmp_path / f"lora{seed}", SHAPES, seed=seed)) for seed in range(4)]


async def told(one: Replica, alias: str) -> list[tuple[str, str, str]]:
    """The history, oldest first: action, who, result."""
    rows = await one.registry.history(alias, 50)
    return [(row["action"], row["who"], row["result"]) for row in reversed(rows)]


async def test_a_put_loads_records_and_publishes(one: Replica, loras: list[str]) -> None:
    row = await one.catalog.put("legal", loras[0], By("ops"))
    route = one.pool.get("legal")
    assert route is not None and route.stable.digest == row.stable
    (record,) = await one.registry.records("legal")
    assert (record.source, record.made_by, record.rank) == (loras[0], "ops", 4)
    assert await told(one, "legal") == [("put", "ops", "ok")]


async def test_the_same_weights_are_the_same_version_and_no_change(
    one: Replica, loras: list[str]
) -> None:
    first = await one.catalog.put("legal", loras[0], BY)
    assert await one.catalog.put("legal", loras[0], BY) == first
    assert len(one.engine.history) == 1 and len(await told(one, "legal")) == 1


async def test_a_misfit_is_refused_before_the_engine_sees_it(one: Replica, tmp_path: Path) -> None:
    other = write_lora(tmp_path / "other", {MODULE: (8, 7)})
    with pytest.raises(AdapterRefused) as refusal:
        await one.catalog.put("legal", str(other), BY)
    assert refusal.value.param == MODULE
    assert one.engine.history == [] and await one.registry.alias("legal") is None
    (row,) = await one.registry.history("legal", 5)
    assert row["result"] == "refused" and row["reason"] == str(refusal.value)


async def test_what_the_engine_refuses_changes_nothing(one: Replica, loras: list[str]) -> None:
    before = await one.catalog.put("legal", loras[0], BY)
    one.engine.refuses = True
    with pytest.raises(EngineRefused):
        await one.catalog.put("legal", loras[1], BY)
    assert await one.registry.alias("legal") == before
    assert one.published()["legal"].endswith(before.stable[:12])
    assert await told(one, "legal") == [("put", "tests", "ok"), ("put", "tests", "failed")]


async def test_rollback_goes_to_the_version_before_and_back_again(
    one: Replica, loras: list[str]
) -> None:
    first = (await one.catalog.put("legal", loras[0], BY)).stable
    second = (await one.catalog.put("legal", loras[1], BY)).stable
    assert (await one.catalog.roll_back("legal", BY)).stable == first
    assert (await one.catalog.roll_back("legal", BY)).stable == second
    assert one.published()["legal"].endswith(second[:12])
    await settled()
    assert len(one.engine.loaded) == 1


async def test_rollback_to_a_named_version(one: Replica, loras: list[str]) -> None:
    digests = [(await one.catalog.put("legal", source, BY)).stable for source in loras[:3]]
    for name in (digests[0], digests[0][:12], f"legal@{digests[0][:12]}"):
        await one.catalog.put("legal", loras[2], BY)
        assert (await one.catalog.roll_back("legal", BY, name)).stable == digests[0]


@pytest.mark.parametrize("version", ["legal@ffffffffffff", "f", ""])
async def test_rollback_to_nothing_says_what_there_is(
    one: Replica, loras: list[str], version: str
) -> None:
    await one.catalog.put("legal", loras[0], BY)
    with pytest.raises((NotFound, Conflict), match=r"legal@|one version only"):
        await one.catalog.roll_back("legal", BY, version)


async def test_a_rollback_after_the_source_has_gone_uses_the_store(
    one: Replica, loras: list[str], tmp_path: Path
) -> None:
    first = (await one.catalog.put("legal", loras[0], BY)).stable
    await one.catalog.put("legal", loras[1], BY)
    shutil.rmtree(loras[0])
    assert (await one.catalog.roll_back("legal", BY)).stable == first


async def test_a_canary_gets_its_share_and_grows_and_is_promoted(
    one: Replica, loras: list[str]
) -> None:
    stable = (await one.catalog.put("legal", loras[0], BY)).stable
    canary = (await one.catalog.canary("legal", BY, 0.2, source=loras[1])).canary
    users = [f"user{n}" for n in range(400)]

    def on_canary() -> set[str]:
        route = one.pool.get("legal")
        assert route is not None
        return {user for user in users if route.version_for(user) is route.canary}

    few = on_canary()
    assert 40 < len(few) < 130  # 80 expected; six standard deviations either way
    await one.catalog.canary("legal", BY, 0.6)
    more = on_canary()
    assert few < more and 180 < len(more) < 300
    row = await one.catalog.promote("legal", BY)
    assert (row.stable, row.previous, row.canary) == (canary, stable, None)
    await settled()
    assert len(one.engine.loaded) == 1
    assert len(one.engine.history) == 2  # promoting loads nothing


async def test_a_canary_can_be_a_known_version_and_be_dropped(
    one: Replica, loras: list[str]
) -> None:
    first = (await one.catalog.put("legal", loras[0], BY)).stable
    second = (await one.catalog.put("legal", loras[1], BY)).stable
    row = await one.catalog.canary("legal", BY, 0.5, version=first[:12])
    assert (row.stable, row.canary, row.weight) == (second, first, 0.5)
    row = await one.catalog.drop_canary("legal", BY)
    assert (row.stable, row.canary, row.weight) == (second, None, 0.0)
    await settled()
    assert len(one.engine.loaded) == 1


async def test_a_canary_needs_an_alias_a_version_and_another_one(
    one: Replica, loras: list[str]
) -> None:
    with pytest.raises(NotFound):
        await one.catalog.canary("legal", BY, 0.5, source=loras[0])
    await one.catalog.put("legal", loras[0], BY)
    with pytest.raises(BadRequest, match="no canary"):
        await one.catalog.canary("legal", BY, 0.5)
    with pytest.raises(Conflict, match="already"):
        await one.catalog.canary("legal", BY, 0.5, source=loras[0])
    for change in (one.catalog.promote, one.catalog.drop_canary):
        with pytest.raises(Conflict, match="no canary"):
            await change("legal", BY)


async def test_a_put_of_the_canarys_weights_ends_it(one: Replica, loras: list[str]) -> None:
    await one.catalog.put("legal", loras[0], BY)
    canary = (await one.catalog.canary("legal", BY, 0.5, source=loras[1])).canary
    row = await one.catalog.put("legal", loras[1], BY)
    assert (row.stable, row.canary, row.weight) == (canary, None, 0.0)


async def test_pins_are_kept_across_swaps_and_bounded(one: Replica, loras: list[str]) -> None:
    await one.catalog.put("a", loras[0], BY, pinned=True)
    await one.catalog.put("b", loras[1], BY, pinned=True)
    with pytest.raises(Conflict, match="a, b"):
        await one.catalog.put("c", loras[2], BY, pinned=True)
    assert (await one.catalog.put("a", loras[3], BY)).pinned
    await settled()
    assert one.engine.pinned == set(one.published().values())
    assert not (await one.catalog.pin("b", BY, pinned=False)).pinned
    assert (await one.catalog.put("c", loras[2], BY, pinned=True)).pinned
    assert one.engine.pinned == {one.published()[alias] for alias in "ac"}


async def test_a_change_of_another_revision_is_refused(one: Replica, loras: list[str]) -> None:
    row = await one.catalog.put("legal", loras[0], BY)
    with pytest.raises(PreconditionFailed, match=f"revision {row.revision}"):
        await one.catalog.put("legal", loras[1], By("tests", revision=row.revision + 1))
    with pytest.raises(PreconditionFailed):
        await one.catalog.delete("legal", By("tests", revision=row.revision + 1))
    after = await one.catalog.put("legal", loras[1], By("tests", revision=row.revision))
    assert after.previous == row.stable
    with pytest.raises(PreconditionFailed, match="not there"):
        await one.catalog.put("new", loras[0], By("tests", revision=5))


async def test_who_comes_second_learns_of_it_and_the_first_stays(
    one: Replica, two: Replica, loras: list[str]
) -> None:
    """Two replicas change one alias while both load: the second write finds another row."""
    await one.catalog.put("legal", loras[0], BY)
    await two.reconciler.turn()
    two.engine.asked.clear()
    two.engine.gate.clear()
    late = asyncio.create_task(two.catalog.put("legal", loras[1], BY))
    await two.engine.asked.wait()
    first = await one.catalog.put("legal", loras[2], BY)
    two.engine.gate.set()
    with pytest.raises(Conflict, match="meanwhile"):
        await late
    await two.reconciler.turn()
    await settled()
    assert two.published() == one.published()
    assert (await one.registry.alias("legal")) == first
    assert two.engine.loaded == [two.published()["legal"]]


async def test_two_puts_of_one_replica_take_turns(one: Replica, loras: list[str]) -> None:
    rows = await asyncio.gather(*(one.catalog.put("legal", source, BY) for source in loras[:3]))
    live = one.pool.get("legal")
    assert live is not None and live.stable.digest == max(rows, key=lambda r: r.revision).stable
    await settled()
    assert len(one.engine.loaded) == 1


async def test_a_crash_between_writing_and_publishing_ends_with_the_registrys_word(
    one: Replica, loras: list[str], tmp_path: Path, database_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    await one.catalog.put("legal", loras[0], BY)

    async def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(one.reconciler, "apply", crash)
    with pytest.raises(KeyboardInterrupt):
        await one.catalog.put("legal", loras[1], BY)
    again = replica(tmp_path / "one", database_url)
    await again.reconciler.start(0.01)
    row = await again.registry.alias("legal")
    assert row is not None and again.published()["legal"].endswith(row.stable[:12])
    assert row.previous is not None
    again.registry.close()


async def test_deleting_is_for_everybody_and_can_be_undone(
    one: Replica, two: Replica, loras: list[str]
) -> None:
    await one.catalog.put("legal", loras[0], BY)
    await two.reconciler.turn()
    await two.catalog.delete("legal", By("ops"))
    await one.reconciler.turn()
    assert one.published() == two.published() == {}
    with pytest.raises(NotFound):
        await one.catalog.delete("legal", BY)
    await one.catalog.put("legal", loras[0], BY)
    assert (await told(one, "legal"))[1] == ("delete", "ops", "ok")


async def test_a_new_alias_that_is_there_already_is_a_conflict(
    one: Replica, loras: list[str]
) -> None:
    await one.catalog.put("legal", loras[0], BY, new=True)
    with pytest.raises(Conflict, match="already"):
        await one.catalog.put("legal", loras[1], BY, new=True)


async def test_while_the_registry_is_silent_every_change_is_503_and_nothing_happens(
    tmp_path: Path, loras: list[str], postgres: Postgres
) -> None:
    one = replica(tmp_path / "one", postgres.fresh())
    await one.reconciler.start(0.01)
    await one.catalog.put("legal", loras[0], BY)
    before = one.published()
    postgres.stop()
    try:
        for change in (
            one.catalog.put("legal", loras[1], BY),
            one.catalog.put("other", loras[1], BY),
            one.catalog.canary("legal", BY, 0.5, source=loras[1]),
            one.catalog.roll_back("legal", BY),
            one.catalog.delete("legal", BY),
        ):
            with pytest.raises(RegistryDown) as refusal:
                await change
            assert refusal.value.status == 503 and json.dumps(refusal.value.body())
    finally:
        postgres.start()
    assert one.published() == before and len(one.engine.loaded) == 1
    one.registry.close()


async def test_every_error_of_a_change_is_a_serve_error(one: Replica, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for source in (str(tmp_path / "none"), str(tmp_path / "file"), "", "s3x://b/k", "\0"):
        with pytest.raises(ServeError):
            await one.catalog.put("legal", source, BY)


async def test_asking_for_the_same_again_tries_again_what_failed_here(
    one: Replica, two: Replica, loras: list[str], tmp_path: Path
) -> None:
    await one.catalog.put("legal", loras[0], BY)
    shutil.move(loras[0], tmp_path / "away")
    await two.reconciler.turn()
    assert two.published() == {} and two.reconciler.failures
    shutil.move(tmp_path / "away", loras[0])
    await two.catalog.put("legal", loras[0], BY)
    assert two.published() == one.published() and not two.reconciler.failures


async def test_a_full_disk_is_told_and_changes_nothing(
    one: Replica, loras: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    await one.catalog.put("legal", loras[0], BY)
    before = one.published()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StoreFailed, match="No space left"):
        await one.catalog.put("legal", loras[1], BY)
    assert one.published() == before and len(list(one.store.root.iterdir())) == 1
