"""Locks by name: one for all who want it at once, none for nobody."""

from __future__ import annotations

import asyncio

import pytest

from serve.adapters.locks import Locks
from tests.fakes import settled


async def test_tasks_take_turns_by_name_and_leave_nothing() -> None:
    locks, inside, most = Locks(), dict.fromkeys("ab", 0), dict.fromkeys("ab", 0)

    async def turn(name: str) -> None:
        async with locks[name]:
            inside[name] += 1
            most[name] = max(inside[name], most[name])
            assert len(locks) <= 2
            await asyncio.sleep(0)
            inside[name] -= 1

    await asyncio.gather(*(turn(name) for name in "abaabbab" for _ in range(9)))
    assert most == {"a": 1, "b": 1} and len(locks) == 0


async def test_who_waits_finds_the_lock_that_is_held() -> None:
    """Its holder leaves, and a newcomer must not get another beside the one who waited."""
    order: list[str] = []
    locks, leave = Locks(), asyncio.Event()

    async def stay(name: str) -> None:
        async with locks["a"]:
            order.append(name)
            await leave.wait()

    first, second = (asyncio.create_task(stay(name)) for name in ("first", "second"))
    await settled()
    assert order == ["first"] and len(locks) == 1
    first.cancel()
    await settled()
    assert order == ["first", "second"] and locks["a"].locked()
    leave.set()
    await second
    assert len(locks) == 0


async def test_a_fault_inside_frees_it() -> None:
    locks = Locks()
    with pytest.raises(ValueError, match="odd"):
        async with locks["a"]:
            raise ValueError("odd")
    assert not locks["a"].locked()
