"""Slots: a bound on different adapters at once, a fair line, and pins that cannot lock it up."""

from __future__ import annotations

import asyncio

import pytest

from serve.adapters import slots as module
from serve.adapters.slots import Slots
from serve.errors import AdapterSlotsFull

TASKS: list[asyncio.Task[None]] = []  # asyncio keeps none alive


async def held(slots: Slots, adapter: str) -> asyncio.Event:
    """Hold a place until the event is set."""
    inside, leave = asyncio.Event(), asyncio.Event()

    async def request() -> None:
        async with slots.place(adapter):
            inside.set()
            await leave.wait()

    TASKS.append(asyncio.create_task(request()))
    await inside.wait()
    return leave


async def test_requests_of_one_adapter_share_its_place() -> None:
    slots = Slots(1, wait_s=0.05)
    async with slots.place("a"), slots.place("a"), slots.place("a"):
        with pytest.raises(AdapterSlotsFull) as refusal:
            async with slots.place("b"):
                pass
    assert refusal.value.status == 503 and refusal.value.retry_after_s
    async with slots.place("b"):
        assert slots.waiting == 0


async def test_the_line_is_served_in_order_of_arrival() -> None:
    slots, served = Slots(1, wait_s=5), []

    async def request(adapter: str) -> None:
        async with slots.place(adapter):
            served.append(adapter)

    async with slots.place("a"):
        waiting = [asyncio.create_task(request(name)) for name in "bcd"]
        await asyncio.sleep(0.01)
        assert slots.waiting == 3
    await asyncio.gather(*waiting)
    assert served == ["b", "c", "d"]


async def test_a_busy_adapter_cannot_keep_others_out_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.0)
    slots = Slots(1, wait_s=5)
    leave = await held(slots, "busy")
    other = asyncio.create_task(held(slots, "other"))
    await asyncio.sleep(0.01)
    newcomer = asyncio.create_task(held(slots, "busy"))
    await asyncio.sleep(0.01)
    assert slots.waiting == 2  # the newcomer stands behind, though its adapter runs
    leave.set()
    (await other).set()
    (await newcomer).set()


async def test_while_nobody_is_impatient_a_busy_adapter_fills_its_batch() -> None:
    slots = Slots(1, wait_s=5)
    leave = await held(slots, "busy")
    other = asyncio.create_task(held(slots, "other"))
    await asyncio.sleep(0.01)
    newcomer = await held(slots, "busy")
    leave.set()
    newcomer.set()
    (await other).set()
    assert slots.waiting == 0


async def test_the_last_place_cannot_be_pinned() -> None:
    slots = Slots(2, wait_s=0.05)
    assert slots.pin("a") and slots.pin("a")
    assert not slots.pin("b")
    async with slots.place("b"), slots.place("a"):
        assert slots.pinned == 1
    slots.unpin("a")
    assert slots.pin("b")


async def test_a_running_adapters_place_is_not_pinned_away() -> None:
    slots = Slots(3, wait_s=0.05)
    assert slots.pin("a")
    leaves = [await held(slots, name) for name in "xy"]
    assert not slots.pin("b")
    leaves[0].set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert slots.pin("b")
    leaves[1].set()


async def test_who_gives_up_waiting_leaves_no_trace() -> None:
    slots = Slots(1, wait_s=5)
    leave = await held(slots, "a")
    patient, impatient = (asyncio.create_task(held(slots, name)) for name in "bc")
    await asyncio.sleep(0.01)
    TASKS[-1].cancel()
    impatient.cancel()
    await asyncio.sleep(0.01)
    assert slots.waiting == 1
    leave.set()
    (await patient).set()
    await asyncio.sleep(0.01)
    async with slots.place("d"):
        assert slots.waiting == 0
