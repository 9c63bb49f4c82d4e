"""Beats and orders over a real socket pair, and an engine that is asked for a sign."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from serve.heartbeat import ORDERS, Beat, EngineSteps, Heart, Pulse

ONE = Beat(accepts=True, engine_dead=False, drained=False, open=0, steps=1)


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_beats_come_up_and_orders_go_down() -> None:
    ours, theirs = pair()
    beat, done = (
        Beat(accepts=True, engine_dead=False, drained=True, open=3, steps=1 << 40),
        list[str](),
    )
    pulse = Pulse(ours)
    assert pulse.late(1e9)
    pulse.order("past", "3", "engine_died")  # before anybody listens
    heart = Heart(theirs.detach(), lambda: beat, {
        "past": lambda count, why: done.append(f"{count} times, {why}"),
        "drain": lambda: done.append("drain"),
    })  # fmt: skip
    heart.start()
    pulse.order("unheard of")
    pulse.order("drain")
    await until(lambda: pulse.beat and len(done) == 2)
    assert pulse.beat == beat and not pulse.late(60) and pulse.accepted is not None
    assert done == ["3 times, engine_died", "drain"] and {"past", "drain"} <= set(ORDERS)
    heart.close()
    pulse.close()


async def test_a_worker_that_is_gone_is_no_beat_and_takes_orders_no_more() -> None:
    ours, theirs = pair()
    theirs.send(ONE.packed())
    pulse = Pulse(ours)
    await until(lambda: pulse.beat)
    theirs.close()
    await until(lambda: pulse.beat is None)
    pulse.order("drain")
    assert pulse.late(60) and pulse.last == ONE
    pulse.close()


async def test_nobody_waits_for_an_end_that_does_not_read() -> None:
    ours, theirs = pair()
    pulse, heart = Pulse(ours), Heart(theirs.detach(), lambda: ONE, {})
    heart.start()
    for _ in range(10_000):  # no turn of the loop between them
        pulse.order("drain")
        heart.beat()
    assert pulse.beat is None
    heart.close()
    pulse.close()


async def test_an_idle_engine_is_asked_and_one_that_fails_to_answer_has_not_come_round() -> None:
    steps, asked = EngineSteps(), 0

    async def question() -> None:
        nonlocal asked
        asked += 1
        if asked > 2:
            raise ConnectionError

    asking = asyncio.create_task(steps.ask(question, 0.001))
    await until(lambda: asked > 5)
    asking.cancel()
    assert steps.count == 2
