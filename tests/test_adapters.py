"""The pool: what a swap does to requests that are running, and what survives."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from serve.adapters import AdapterPool
from serve.errors import AdapterRefused, AdapterSlotsFull, NotFound
from serve.store import Base
from tests.fakes import EngineRefused, MemoryEngine
from tests.lora import write_lora

SHAPES = {"model.layers.0.self_attn.q_proj": (8, 6)}
BASE = Base(SHAPES, max_rank=8, weights=None)


@pytest.fixture
def engine() -> MemoryEngine:
    return MemoryEngine()


@pytest.fixture
def pool(engine: MemoryEngine, tmp_path: Path) -> AdapterPool:
    return AdapterPool(engine, BASE, tmp_path / "state", aliases=2)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [write_lora(tmp_path / f"lora{seed}", SHAPES, seed=seed) for seed in range(4)]


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_running_request_keeps_its_version(
    pool: AdapterPool, engine: MemoryEngine, folders: list[Path]
) -> None:
    first = await pool.put("legal", folders[0])
    held = pool.lease("legal")
    second = await pool.put("legal", folders[1])
    assert held is first and pool.get("legal") is second
    await settled()
    assert engine.loaded == [first.name, second.name]
    pool.release(first)
    await settled()
    assert engine.loaded == [second.name]


async def test_an_idle_version_leaves_at_once(
    pool: AdapterPool, engine: MemoryEngine, folders: list[Path]
) -> None:
    await pool.put("legal", folders[0])
    second = await pool.put("legal", folders[1])
    await settled()
    assert engine.loaded == [second.name]


async def test_the_same_weights_are_the_same_version(
    pool: AdapterPool, engine: MemoryEngine, folders: list[Path]
) -> None:
    first = await pool.put("legal", folders[0])
    assert await pool.put("legal", folders[0]) is first
    assert engine.history == [first.name]


async def test_a_failed_load_leaves_the_old_version_published(
    pool: AdapterPool, engine: MemoryEngine, folders: list[Path]
) -> None:
    first = await pool.put("legal", folders[0])
    engine.refuses = True
    with pytest.raises(EngineRefused):
        await pool.put("legal", folders[1])
    assert pool.get("legal") is first and engine.loaded == [first.name]


async def test_more_aliases_than_slots_are_refused(pool: AdapterPool, folders: list[Path]) -> None:
    await pool.put("a", folders[0])
    await pool.put("b", folders[1])
    with pytest.raises(AdapterSlotsFull, match="--max-adapters"):
        await pool.put("c", folders[2])
    assert [version.alias for version in pool.live()] == ["a", "b"]


async def test_a_swap_waits_for_a_slot_and_then_says_so(
    pool: AdapterPool, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.adapters.ROOM_TIMEOUT_S", 0.05)
    await pool.put("a", folders[0])
    await pool.put("b", folders[1])
    assert pool.lease("a") is not None
    await pool.put("a", folders[2])
    with pytest.raises(AdapterSlotsFull, match="running requests"):
        await pool.put("b", folders[3])


async def test_a_slot_that_frees_up_lets_the_waiting_swap_through(
    pool: AdapterPool, folders: list[Path]
) -> None:
    await pool.put("a", folders[0])
    await pool.put("b", folders[1])
    held = pool.lease("a")
    assert held is not None
    await pool.put("a", folders[2])
    waiting = asyncio.create_task(pool.put("b", folders[3]))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    pool.release(held)
    fresh = await waiting
    assert pool.get("b") is fresh


async def test_deleting_lets_requests_finish(
    pool: AdapterPool, engine: MemoryEngine, folders: list[Path]
) -> None:
    version = await pool.put("legal", folders[0])
    pool.lease("legal")
    await pool.delete("legal")
    await settled()
    assert pool.get("legal") is None and engine.loaded == [version.name]
    pool.release(version)
    await settled()
    assert engine.loaded == []


async def test_deleting_an_unknown_alias_is_an_error(pool: AdapterPool) -> None:
    with pytest.raises(NotFound, match="'ghost'"):
        await pool.delete("ghost")


async def test_a_restarted_worker_finds_its_adapters_again(
    pool: AdapterPool, folders: list[Path], tmp_path: Path
) -> None:
    version = await pool.put("legal", folders[0])
    (folders[0] / "adapter_model.safetensors").unlink()  # the source may go: the store has it
    again = AdapterPool(MemoryEngine(), BASE, tmp_path / "state", aliases=2)
    await again.restore({})
    restored = again.get("legal")
    assert restored is not None and restored.name == version.name


async def test_one_bad_adapter_does_not_keep_the_others_out(
    pool: AdapterPool, folders: list[Path], tmp_path: Path
) -> None:
    await pool.restore({"good": folders[0], "bad": tmp_path / "missing"})
    assert [version.alias for version in pool.live()] == ["good"]


async def test_a_misfit_is_refused_before_the_engine_sees_it(
    pool: AdapterPool, engine: MemoryEngine, tmp_path: Path
) -> None:
    other = write_lora(tmp_path / "other", {"model.layers.0.self_attn.q_proj": (8, 7)})
    with pytest.raises(AdapterRefused) as refusal:
        await pool.put("legal", other)
    assert refusal.value.param == "model.layers.0.self_attn.q_proj"
    assert engine.history == []
