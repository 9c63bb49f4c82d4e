"""Converging: restarts, crashes, second replicas, lost files, silent databases."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from serve.adapters import last_seen
from serve.adapters import reconciler as module
from serve.adapters.pool import Route
from serve.adapters.rows import Alias, Event
from serve.adapters.sources import Sources
from serve.adapters.store import Base
from tests.fakes import BASE, BY, SHAPES, Replica, replica, settled
from tests.lora import write_lora
from tests.postgres import Postgres

Make = Callable[..., Replica]


@pytest.fixture
def make(tmp_path: Path, database_url: str) -> Iterator[Make]:
    """Another replica, or the same one started again when the name is."""
    every: list[Replica] = []

    def made(name: str = "one", base: Base = BASE, base_name: str = "base") -> Replica:
        folder, names = tmp_path / name, (base_name, "its-other-name")
        every.append(replica(folder, database_url, name=name, base=base, base_names=names))
        return every[-1]

    yield made
    for each in every:
        each.registry.close()


@pytest.fixture
def loras(tmp_path: Path) -> list[Path]:
    return [write_lora(tmp_path / f"lora{seed}", SHAPES, seed=seed) for seed in range(3)]


async def started(made: Replica) -> Replica:
    await made.reconciler.start(0.01)
    return made


async def test_a_restart_finds_its_adapters_again_without_their_sources(
    make: Make, loras: list[Path]
) -> None:
    before = await started(make())
    await before.catalog.put("legal", str(loras[0]), BY)
    await before.catalog.put("chat", str(loras[1]), BY, pinned=True)
    for folder in loras:
        shutil.rmtree(folder)
    after = await started(make())
    assert after.published() == before.published()
    assert after.engine.pinned == {before.published()["chat"]}


async def test_a_second_replica_follows_every_change(make: Make, loras: list[Path]) -> None:
    one, two = await started(make("one")), await started(make("two"))
    await one.catalog.put("legal", str(loras[0]), BY)
    await two.reconciler.turn()
    assert two.published() == one.published()
    await two.catalog.put("legal", str(loras[1]), BY)
    await one.reconciler.turn()
    await settled()
    assert one.published() == two.published()
    assert one.engine.loaded == [two.published()["legal"]]  # the old one has left
    await one.catalog.canary("legal", BY, 0.5, source=str(loras[2]))
    await two.reconciler.turn()
    route = two.pool.get("legal")
    assert route is not None and route.canary is not None and route.weight == 0.5
    await one.catalog.canary("legal", BY, 0.7)
    await two.reconciler.turn()
    route = two.pool.get("legal")
    assert route is not None and route.weight == 0.7
    await one.catalog.delete("legal", BY)
    await two.reconciler.turn()
    await settled()
    assert two.published() == {} and two.engine.loaded == []


async def test_nothing_to_do_is_nothing_done(make: Make, loras: list[Path]) -> None:
    one = await started(make())
    await one.catalog.put("legal", str(loras[0]), BY)
    for _ in range(3):
        await one.reconciler.turn()
    assert len(one.engine.history) == 1


async def test_a_look_that_began_before_a_change_here_does_not_undo_it(
    make: Make, loras: list[Path]
) -> None:
    one = await started(make())
    await one.catalog.put("legal", str(loras[0]), BY)
    stale = await one.registry.snapshot()
    await one.catalog.put("legal", str(loras[1]), BY)
    expected = one.published()
    await one.reconciler._converge(stale)
    assert one.published() == expected
    await one.catalog.delete("legal", BY)
    await one.reconciler._converge(stale)
    assert one.published() == {}


async def test_a_source_that_changed_is_not_served_as_the_old_version(
    make: Make, loras: list[Path]
) -> None:
    one, two = await started(make("one")), await started(make("two"))
    await one.catalog.put("legal", str(loras[0]), BY)
    write_lora(loras[0], SHAPES, seed=9)
    await two.reconciler.turn()
    assert two.published() == {}
    (failure,) = two.reconciler.failures.values()
    assert "now, not" in failure.reason
    (state,) = [s for s in await one.registry.states("legal") if s["replica"] == "two"]
    assert state["state"] == "failed" and state["reason"] == failure.reason
    assert two.metrics.adapters_failed._value.get() == 1


async def test_what_fails_is_tried_again_less_and_less_often(
    make: Make, loras: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await started(make())
    await one.catalog.put("legal", str(loras[0]), BY)
    shutil.rmtree(loras[0])
    monkeypatch.setattr(module, "PAUSES_S", (1000, 2000))
    two = await started(make("two"))
    (failure,) = two.reconciler.failures.values()
    await two.reconciler.turn()
    assert list(two.reconciler.failures.values()) == [failure]  # not before its time
    monkeypatch.setattr(module, "PAUSES_S", (0, 0))
    two.reconciler.failures = {
        key: module.Failure(f.reason, f.attempts, 0.0) for key, f in two.reconciler.failures.items()
    }
    await two.reconciler.turn()
    (again,) = two.reconciler.failures.values()
    assert again.attempts == 2
    write_lora(loras[0], SHAPES, seed=0)
    await two.reconciler.turn()
    assert two.published() == one.published() and not two.reconciler.failures
    assert two.metrics.adapters_failed._value.get() == 0


async def test_one_bad_version_does_not_keep_the_others_out(make: Make, loras: list[Path]) -> None:
    one = await started(make("one"))
    for number, folder in enumerate(loras):
        await one.catalog.put(f"a{number}", str(folder), BY)
    shutil.rmtree(loras[1])
    two = await started(make("two"))
    assert set(two.published()) == {"a0", "a2"}


async def test_an_alias_keeps_what_it_has_when_the_new_version_fails_here(
    make: Make, loras: list[Path]
) -> None:
    one, two = await started(make("one")), await started(make("two"))
    await one.catalog.put("legal", str(loras[0]), BY)
    await two.reconciler.turn()
    served = two.published()
    await one.catalog.put("legal", str(loras[1]), BY)
    shutil.rmtree(loras[1])
    await two.reconciler.turn()
    assert two.published() == served


async def test_a_failing_canary_leaves_everybody_on_the_stable_version(
    make: Make, loras: list[Path]
) -> None:
    one, two = await started(make("one")), await started(make("two"))
    await one.catalog.put("legal", str(loras[0]), BY)
    await one.catalog.canary("legal", BY, 1.0, source=str(loras[1]))
    shutil.rmtree(loras[1])
    await two.reconciler.turn()
    version = two.pool.lease("legal", "anybody")
    assert version is not None and version.name == one.published()["legal"]


async def test_files_that_rot_in_the_store_are_fetched_again(
    make: Make, loras: list[Path], tmp_path: Path
) -> None:
    one = await started(make())
    await one.catalog.put("legal", str(loras[0]), BY)
    (folder,) = (tmp_path / "one" / "store").iterdir()
    weights = folder / "adapter_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    again = await started(make())
    assert again.published() == one.published()
    assert weights.read_bytes() == (loras[0] / "adapter_model.safetensors").read_bytes()


async def test_another_base_under_the_same_registry_is_a_reason_and_not_a_crash(
    make: Make, loras: list[Path]
) -> None:
    one = await started(make())
    await one.catalog.put("legal", str(loras[0]), BY)
    other = await started(make(base=Base({"model.other": (8, 6)}, max_rank=8, weights=None)))
    assert other.published() == {}
    (failure,) = other.reconciler.failures.values()
    assert "no such module in the base" in failure.reason


async def test_the_store_keeps_what_versions_and_requests_need_and_sweeps_the_rest(
    make: Make, loras: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await started(make())
    for folder in loras:
        await one.catalog.put("legal", str(folder), BY)
    held = one.pool.lease("legal", "anybody")
    assert held is not None
    other = write_lora(tmp_path / "other", SHAPES, seed=7)
    for seed in range(20, 24):  # three are kept: the older ones of the first are pruned
        write_lora(other, SHAPES, seed=seed)
        await one.catalog.put("legal", str(other), BY)
    monkeypatch.setattr("serve.adapters.store.UNNEEDED_S", -1.0)
    one.reconciler._swept_at = one.reconciler._reported_at = -1e9
    await one.reconciler.turn()
    kept = {folder.name for folder in (tmp_path / "one" / "store").iterdir()}
    records = {record.digest for record in await one.registry.records("legal")}
    assert kept == records | {held.digest}
    assert len(records) == 3


@pytest.mark.parametrize("name", ["base", "its-other-name"])
async def test_an_alias_of_the_bases_name_fails_wherever_it_was_made(
    make: Make, loras: list[Path], name: str
) -> None:
    """By a replica with another base name, or before this one was renamed."""
    one = await started(make("one", base_name="theirs"))
    one.pool.base_names = frozenset({"theirs"})
    await one.catalog.put(name, str(loras[0]), BY)
    await one.catalog.put("legal", str(loras[1]), BY)
    two = await started(make("two"))
    assert set(two.published()) == {"legal"}
    (failure,) = two.reconciler.failures.values()
    assert failure.reason == f"{name!r} is the base model's name"
    assert two.pool.lease(name, "anybody") is None
    await one.catalog.put(name, str(loras[2]), BY)
    await two.reconciler.turn()
    assert set(two.published()) == {"legal"}
    await two.catalog.delete(name, BY)
    assert not two.reconciler.failures
    await one.reconciler.turn()
    assert set(one.published()) == {"legal"}


@pytest.mark.parametrize("name", ["..", "a/../b", "a//b", "/a"])
async def test_an_alias_that_cannot_be_fails_with_its_reason(
    make: Make, loras: list[Path], name: str
) -> None:
    """As an older release made them."""
    one = await started(make("one"))
    await one.catalog.put("legal", str(loras[0]), BY)
    (record,) = await one.registry.records("legal")
    row = Alias(name, record.digest)
    await one.registry.change(lambda _: row, Event(name, "put", "me"), replace(record, alias=name))
    assert await one.reconciler.turn()
    assert set(one.published()) == {"legal"}
    (failure,) = one.reconciler.failures.values()
    assert "alias" in failure.reason


async def test_what_cannot_be_read_of_one_is_its_own_failure(
    make: Make, loras: list[Path], tmp_path: Path
) -> None:
    one = await started(make())
    for number, folder in enumerate(loras):
        await one.catalog.put(f"a{number}", str(folder), BY)
    digests = {row.alias: row.stable for row in one.reconciler.rows.values()}
    config = tmp_path / "one" / "store" / digests["a1"] / "adapter_config.json"
    config.unlink()
    config.symlink_to("/proc/self/mem")  # there, and not to be read by anybody
    again = await started(make())
    assert set(again.published()) == {"a0", "a2"}
    (failure,) = again.reconciler.failures.values()
    assert digests["a1"][:12] in failure.reason


async def test_a_fault_of_ours_with_one_alias_is_its_own_failure(
    make: Make, loras: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = await started(make())
    for number, folder in enumerate(loras):
        await one.catalog.put(f"a{number}", str(folder), BY)
    again = make()
    stock = again.pool.publish

    async def publish(alias: str, route: Route | None) -> None:
        if alias == "a1":
            raise ZeroDivisionError("ours")
        await stock(alias, route)

    monkeypatch.setattr(again.pool, "publish", publish)
    await started(again)
    assert set(again.published()) == {"a0", "a2"}
    (failure,) = again.reconciler.failures.values()
    assert failure.reason == "ZeroDivisionError: ours" and "Traceback" in caplog.text


async def test_a_cache_that_cannot_be_written_is_one_line_and_written_when_it_can_be(
    make: Make, loras: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "one" / "registry-cache.partial").mkdir(parents=True)
    one = await started(make())
    for number, folder in enumerate(loras):
        await one.catalog.put(f"a{number}", str(folder), BY)
        assert await one.reconciler.turn()
    assert caplog.text.count("cannot be written") == 1
    (tmp_path / "one" / "registry-cache.partial").rmdir()
    assert await one.reconciler.turn()
    seen = last_seen.read(tmp_path / "one" / "registry-cache.json")
    assert seen is not None and set(seen.snapshot.aliases) == {"a0", "a1", "a2"}


async def test_a_source_that_hangs_holds_up_nobody_and_can_be_replaced(
    make: Make, loras: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await started(make("one"))
    for number, folder in enumerate(loras):
        await one.catalog.put(f"a{number}", str(folder), BY)
    two, gate = make("two"), threading.Event()
    stock = Sources.fetch

    def fetch(self: Sources, source: str, into: Path) -> str:
        if source == str(loras[1]):
            gate.wait(60)
        return stock(self, source, into)

    monkeypatch.setattr(Sources, "fetch", fetch)
    monkeypatch.setattr(module, "START_WAIT_S", 2.0)
    await started(two)
    assert set(two.published()) == {"a0", "a2"}
    async with asyncio.timeout(30):
        await two.catalog.put("a1", str(loras[0]), BY)
    expected = two.published()
    assert set(expected) == {"a0", "a1", "a2"}
    gate.set()
    async with asyncio.timeout(30):
        while two.reconciler._under_way:  # noqa: ASYNC110 - a thread will end
            await asyncio.sleep(0.01)
    assert await two.reconciler.turn()
    assert two.published() == expected and not two.reconciler.failures


async def test_a_change_here_is_looked_at_without_waiting_for_the_next_look(
    make: Make, loras: list[Path], tmp_path: Path
) -> None:
    one = await started(make())
    watching = asyncio.create_task(one.reconciler.watch(3600))
    await one.catalog.put("legal", str(loras[0]), BY)
    cache = tmp_path / "one" / "registry-cache.json"
    async with asyncio.timeout(30):
        while "legal" not in cache.read_text():  # noqa: ASYNC110 - the watch has no event for it
            await asyncio.sleep(0.01)
    watching.cancel()
    await asyncio.wait({watching})
    assert watching.cancelled()


class TestSilence:
    """PostgreSQL goes away and comes back."""

    @pytest.fixture
    def database_url(self, postgres: Postgres) -> str:
        return postgres.fresh()

    async def test_what_is_loaded_goes_on_serving_and_the_rest_follows_later(
        self, make: Make, loras: list[Path], postgres: Postgres
    ) -> None:
        one, two = await started(make("one")), await started(make("two"))
        await one.catalog.put("legal", str(loras[0]), BY)
        await two.reconciler.turn()
        postgres.stop()
        try:
            assert not await two.reconciler.turn()
            assert two.metrics.registry_up._value.get() == 0
            assert two.pool.lease("legal", "anybody") is not None
        finally:
            postgres.start()
        await one.catalog.put("chat", str(loras[1]), BY)
        assert await two.reconciler.turn()
        assert two.metrics.registry_up._value.get() == 1
        assert two.published() == one.published()

    async def test_a_crash_meanwhile_is_survived_by_the_last_state_seen(
        self, make: Make, loras: list[Path], postgres: Postgres
    ) -> None:
        one = await started(make())
        await one.catalog.put("legal", str(loras[0]), BY)
        await one.reconciler.turn()
        postgres.stop()
        try:
            again = await started(make())
            assert again.published() == one.published()
        finally:
            postgres.start()
        assert await again.reconciler.turn()
        assert len(again.engine.history) == 1

    async def test_a_first_start_waits_for_the_registry(
        self, make: Make, loras: list[Path], postgres: Postgres
    ) -> None:
        one = await started(make("one"))
        await one.catalog.put("legal", str(loras[0]), BY)
        postgres.stop()
        try:
            two = make("two")
            starting = asyncio.create_task(started(two))
            await asyncio.sleep(0.2)
            assert not starting.done()
        finally:
            postgres.start()
        async with asyncio.timeout(30):
            await starting
        assert two.published() == one.published()
