"""The pool: what a swap does to requests that are running, and who keeps a place."""

from __future__ import annotations

import asyncio
import gc
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from serve.adapters.pool import AdapterPool, Route, Version
from serve.adapters.slots import Slots
from serve.adapters.sources import Sources
from serve.adapters.store import Store, Stored
from serve.errors import AdapterSlotsFull, BadRequest, Conflict
from tests.fakes import BASE, SHAPES, EngineRefused, MemoryEngine, settled
from tests.lora import write_lora


@pytest.fixture
def engine() -> MemoryEngine:
    return MemoryEngine()


@pytest.fixture
def pool(engine: MemoryEngine) -> AdapterPool:
    return AdapterPool(engine, Slots(3, wait_s=0.1))


@pytest.fixture
def stored(tmp_path: Path) -> list[Stored]:
    store = Store(tmp_path / "store", BASE, Sources())
    folders = [write_lora(tmp_path / f"lora{seed}", SHAPES, seed=seed) for seed in range(4)]
    return [store.take_in(str(folder)) for folder in folders]


async def put(pool: AdapterPool, alias: str, stored: Stored, *, pinned: bool = False) -> Version:
    """Load beside, publish, give the loader's lease back."""
    version = await pool.load(alias, stored)
    await pool.publish(alias, Route(version, pinned=pinned))
    pool.release(version)
    return version


async def test_a_running_request_keeps_its_version(
    pool: AdapterPool, engine: MemoryEngine, stored: list[Stored]
) -> None:
    first = await put(pool, "legal", stored[0])
    held = pool.lease("legal", "somebody")
    second = await put(pool, "legal", stored[1])
    assert held is first
    await settled()
    assert engine.loaded == [first.name, second.name]
    pool.release(first)
    await settled()
    assert engine.loaded == [second.name]


async def test_an_idle_version_leaves_at_once(
    pool: AdapterPool, engine: MemoryEngine, stored: list[Stored]
) -> None:
    await put(pool, "legal", stored[0])
    second = await put(pool, "legal", stored[1])
    await settled()
    assert engine.loaded == [second.name]


async def test_a_version_that_still_runs_is_taken_up_again_and_not_loaded_twice(
    pool: AdapterPool, engine: MemoryEngine, stored: list[Stored]
) -> None:
    first = await put(pool, "legal", stored[0])
    pool.lease("legal", "somebody")
    await put(pool, "legal", stored[1])
    assert await put(pool, "legal", stored[0]) is first
    pool.release(first)
    await settled()
    assert engine.loaded == [first.name]
    assert engine.history.count(first.name) == 1


async def test_a_version_that_is_taken_again_while_it_leaves_stays(
    pool: AdapterPool, engine: MemoryEngine, stored: list[Stored]
) -> None:
    first = await put(pool, "legal", stored[0])
    await put(pool, "legal", stored[1])  # first's unloading is on its way
    again = await put(pool, "legal", stored[0])
    await settled()
    assert engine.loaded == [again.name] and again.name == first.name


async def test_a_failed_load_leaves_nothing(
    pool: AdapterPool, engine: MemoryEngine, stored: list[Stored]
) -> None:
    engine.refuses = True
    with pytest.raises(EngineRefused):
        await pool.load("legal", stored[0])
    assert pool.loaded() == [] and len(pool) == 0


async def test_an_engine_that_is_going_away_leaves_no_fault_that_nobody_retrieves(
    pool: AdapterPool, engine: MemoryEngine, stored: list[Stored], caplog: pytest.LogCaptureFixture
) -> None:
    """A stream that ends in a drain holds the version before a swap."""
    unhandled: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, told: unhandled.append(told))
    first = await put(pool, "legal", stored[0])
    pool.lease("legal", "somebody")
    await put(pool, "legal", stored[1])
    engine.refuses = True
    pool.release(first)
    await settled()
    gc.collect()
    assert unhandled == []
    assert caplog.text.count(first.name) == 2  # whose version, and the engine's words for it
    assert first in pool.loaded(), "the engine has it: a second load would be the end of vLLM's"
    engine.refuses = False
    assert await put(pool, "legal", stored[0]) is first


async def test_closing_waits_for_no_answer_of_an_engine_that_has_gone(
    pool: AdapterPool, engine: MemoryEngine, stored: list[Stored], caplog: pytest.LogCaptureFixture
) -> None:
    await put(pool, "legal", stored[0])
    await put(pool, "legal", stored[1])
    engine.gate.clear()  # for ever
    await settled()
    async with asyncio.timeout(5):
        await pool.close()
    assert asyncio.all_tasks() == {asyncio.current_task()} and caplog.text == ""


async def test_two_loads_of_one_version_are_one(
    pool: AdapterPool, engine: MemoryEngine, stored: list[Stored]
) -> None:
    engine.gate.clear()
    loads = [asyncio.create_task(pool.load("legal", stored[0])) for _ in range(2)]
    await settled()
    engine.gate.set()
    one, other = await asyncio.gather(*loads)
    assert one is other and one.leases == 2 and len(engine.history) == 1


async def test_nothing_is_kept_of_the_versions_that_swaps_leave_behind(
    pool: AdapterPool, engine: MemoryEngine, stored: list[Stored]
) -> None:
    for number in range(200):
        await put(pool, "legal", replace(stored[0], digest=f"{number:012x}"))
        # The one that came, and those whose way out of the engine has only begun.
        assert len(pool.locks) <= len(pool.loaded())
        if number % 5 == 0:
            await settled()
    await settled()
    assert len(pool.locks) == 0 and len(pool.loaded()) == 1 and len(engine.history) == 200


async def test_deleting_lets_requests_finish(
    pool: AdapterPool, engine: MemoryEngine, stored: list[Stored]
) -> None:
    version = await put(pool, "legal", stored[0])
    pool.lease("legal", "somebody")
    await pool.publish("legal", None)
    await settled()
    assert pool.get("legal") is None and engine.loaded == [version.name]
    pool.release(version)
    await settled()
    assert engine.loaded == []


async def test_an_answer_outlives_the_request_that_asked_for_it(
    pool: AdapterPool, engine: MemoryEngine, stored: list[Stored]
) -> None:
    """A background response: its HTTP request has ended, the engine still works for it."""
    version = await put(pool, "legal", stored[0])
    async with pool.running(version):
        await pool.publish("legal", None)
        await settled()
        assert engine.loaded == [version.name]
    await settled()
    assert engine.loaded == []


async def test_more_adapters_than_slots_take_turns(pool: AdapterPool, stored: list[Stored]) -> None:
    versions = [await put(pool, f"a{n}", one) for n, one in enumerate(stored)]
    at_once, most = 0, 0

    async def request(version: Version) -> None:
        nonlocal at_once, most
        async with pool.running(version):
            at_once += 1
            most = max(most, at_once)
            await asyncio.sleep(0.01)
            at_once -= 1

    await asyncio.gather(*(request(version) for version in versions))
    assert most == 3


async def test_a_pinned_version_keeps_its_slot_and_its_successor_gets_it(
    pool: AdapterPool, engine: MemoryEngine, stored: list[Stored]
) -> None:
    first = await put(pool, "legal", stored[0], pinned=True)
    assert engine.pinned == {first.name}
    pool.lease("legal", "somebody")
    second = await put(pool, "legal", stored[1], pinned=True)
    assert engine.pinned == {first.name, second.name}
    pool.release(first)
    await settled()
    assert engine.pinned == {second.name}


async def test_a_successor_waits_for_its_predecessors_slot(
    pool: AdapterPool, engine: MemoryEngine, stored: list[Stored]
) -> None:
    """Two of three slots may be pinned; both are, and one of them swaps."""
    first = await put(pool, "legal", stored[0], pinned=True)
    other = await put(pool, "chat", stored[1], pinned=True)
    pool.lease("legal", "somebody")
    second = await put(pool, "legal", stored[2], pinned=True)
    assert engine.pinned == {first.name, other.name}
    pool.release(first)
    await settled()
    assert engine.pinned == {second.name, other.name}


async def test_unpinning_gives_the_slot_back(
    pool: AdapterPool, engine: MemoryEngine, stored: list[Stored]
) -> None:
    version = await put(pool, "legal", stored[0], pinned=True)
    await put(pool, "legal", stored[0], pinned=False)
    assert engine.pinned == set() and engine.loaded == [version.name]
    assert pool.slots.pinned == 0


async def test_when_every_slot_is_held_a_request_is_refused_and_not_kept_hanging(
    pool: AdapterPool, stored: list[Stored]
) -> None:
    await put(pool, "a", stored[0], pinned=True)
    await put(pool, "b", stored[1], pinned=True)
    running, late = await put(pool, "c", stored[2]), await put(pool, "d", stored[3])
    async with pool.running(running):
        with pytest.raises(AdapterSlotsFull, match="2 of 3 are pinned"):
            async with pool.running(late):
                raise AssertionError("there was no slot")
    async with pool.running(late):
        assert pool.slots.waiting == 0


async def test_a_soft_prompt_needs_no_slot(
    pool: AdapterPool, engine: MemoryEngine, stored: list[Stored], tmp_path: Path
) -> None:
    soft = Stored("e" * 64, tmp_path, 0, 0, virtual_tokens=5)
    kept = await put(pool, "soft", soft, pinned=True)
    assert engine.pinned == set() and pool.slots.pinned == 0
    async with AsyncExitStack() as running:
        for place in range(3):
            version = await put(pool, f"lora{place}", stored[place])
            await running.enter_async_context(pool.running(version))
        async with pool.running(kept):
            assert kept.leases == 1
    await pool.publish("soft", None)
    await settled()
    assert kept.name not in engine.loaded
    without = AdapterPool(engine, Slots(0, wait_s=0.1))
    assert (await without.load("soft", soft)).soft
    with pytest.raises(Conflict):
        await without.load("lora", stored[0])


async def test_a_version_is_asked_for_by_its_own_name(
    pool: AdapterPool, stored: list[Stored]
) -> None:
    pool.base_names = frozenset({f"legal@{'0' * 12}"})
    stable = await put(pool, "legal", stored[0])
    canary = await pool.load("legal", stored[1])
    await pool.publish("legal", Route(stable, canary, 0.0))
    pool.release(canary)
    assert pool.asked("legal") == ("legal", None)
    for version in (stable, canary):
        for digits in (12, 13, 64):
            assert pool.asked(f"legal@{version.digest[:digits]}") == ("legal", version)
    for model in (f"legal@{stored[2].digest[:12]}", f"legal@{stable.digest[:11]}",
                  f"other@{stable.digest[:12]}", f"legal@{'0' * 12}", "legal@", "@"):  # fmt: skip
        assert pool.asked(model) == (model, None)
    await pool.publish("legal", Route(canary))
    assert pool.asked(stable.name) == (stable.name, None), "it is not published any more"


async def test_nothing_is_published_under_the_bases_name_or_none(
    engine: MemoryEngine, stored: list[Stored]
) -> None:
    pool = AdapterPool(engine, Slots(3, wait_s=0.1), ("base", "also"))
    for alias in ("base", "also", "..", "a/../b"):
        version = await pool.load(alias, stored[0])
        with pytest.raises(BadRequest):
            await pool.publish(alias, Route(version))
        pool.release(version)
        assert pool.lease(alias, "anybody") is None
        await pool.publish(alias, None)
    await settled()
    assert engine.loaded == []


async def test_pins_are_settled_one_after_the_other(stored: list[Stored]) -> None:
    """Pinned and unpinned at once: what the engine was told last is what is known of it."""

    class Slow(MemoryEngine):
        async def pin(self, version: Version) -> bool:
            await self.gate.wait()
            return await super().pin(version)

    engine = Slow()
    pool = AdapterPool(engine, Slots(3, wait_s=0.1))
    version = await pool.load("legal", stored[0])
    engine.gate.clear()
    pinning = asyncio.create_task(pool.publish("legal", Route(version, pinned=True)))
    await settled()
    unpinning = asyncio.create_task(pool.publish("legal", Route(version)))
    await settled()
    engine.gate.set()
    await asyncio.gather(pinning, unpinning)
    assert not version.pinned and pool.slots.pinned == 0
    assert engine.pinned == set() and engine.loaded == [version.name]
