"""`quantserve chat`: the stream however it is cut, one question, a conversation in a terminal.

The model is the stand-in of tests/answering.py.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import time
from collections.abc import AsyncIterator
from contextlib import nullcontext
from typing import Any

import pytest

from serve.client.chat import Answer, Chat
from serve.client.connection import Address, Connection, ServerError
from tests.answering import KEY, QUANTSERVE, Answering, speaking, terminal

# A signal that comes where readline has written its prompt and does not wait yet.
BETWEEN = """
import ctypes, readline, signal, sys
from functools import partial
from serve.client import chat
readline.set_pre_input_hook(partial(getattr(ctypes.CDLL(None), "raise"), signal.SIGTERM))
signal.signal(signal.SIGTERM, signal.default_int_handler)
try:
    with chat.ticking():
        input("base> ")
except KeyboardInterrupt:
    sys.exit("ended")
"""
TIMING = re.compile(r"first token \d+ ms, 4 tokens(, [\d.]+ tokens/s)?")


@pytest.fixture
async def chat(live: Answering) -> AsyncIterator[Chat]:
    async with Connection(Address(live.url, KEY)) as connection:
        yield Chat(connection, "base", "", lambda _: None)


async def ask(chat: Chat, question: str) -> Answer:
    answer = Answer(time.monotonic())
    await chat.ask(question, answer)
    return answer


@pytest.mark.parametrize("question", ["hello there", "bytes é", "lump"])
async def test_a_stream_is_read_however_it_is_cut(chat: Chat, question: str) -> None:
    answer = await ask(chat, question)
    assert answer.text == f"1 messages, {question} "
    assert (answer.tokens, answer.head, answer.reason) == (4, 1, "stop")


@pytest.mark.parametrize(
    ("question", "why"),
    [("cut", "^the server failed to answer"), ("fault", "^the engine has ended$")],
)
async def test_a_stream_that_breaks_off_is_an_error_and_what_was_said_is_kept(
    chat: Chat, question: str, why: str
) -> None:
    with pytest.raises(ServerError, match=why):
        await ask(chat, question)
    assert [turn["role"] for turn in chat.messages] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b'data: {"choices": []}\n\n', "closed before the answer's end"),
        (b"data: " + b"x" * (2 << 20), "exceeded"),
        (b"data: nonsense\n\n", "no JSON object"),
        (b'data: {"choices": [{"delta": 3}], "usage": 4}\n\ndata: [DONE]\n\n', None),
    ],
    ids=["cut", "long", "nonsense", "strange"],
)
async def test_a_stream_of_somebody_elses_is_held_to_the_same(said: bytes, why: str | None) -> None:
    stream = speaking(200, said, **{"content-type": "text/event-stream"})
    async with stream as url, Connection(Address(url)) as connection:
        chat = Chat(connection, "base", "", lambda _: None)
        with pytest.raises(ServerError, match=why) if why else nullcontext():
            assert (await ask(chat, "hi")).text == ""
    assert chat.messages == []


async def test_a_question_that_was_not_answered_is_not_part_of_the_conversation(
    chat: Chat, live: Answering
) -> None:
    live.serving.drain()
    with pytest.raises(ServerError, match="shutting down"):
        await ask(chat, "hello")
    assert chat.messages == []


async def test_the_conversation_and_the_system_prompt_go_along(chat: Chat, live: Answering) -> None:
    chat.system = "be brief"
    await ask(chat, "one")
    await ask(chat, "two")
    body: dict[str, Any] = live.chats.asked[-1]
    assert [(m["role"], m["content"]) for m in body["messages"]] == [
        ("system", "be brief"), ("user", "one"), ("assistant", "2 messages, one "), ("user", "two"),
    ]  # fmt: skip


async def test_thoughts_are_shown_apart_and_are_no_part_of_the_answer(chat: Chat) -> None:
    heard: list[str] = []
    chat.thoughts = heard.append
    answer = await ask(chat, "think")
    assert "".join(heard) == "hm \n\n" and answer.text == "1 messages, think "
    assert answer.first is not None and answer.head == 1


def test_the_rate_is_of_tokens_behind_the_first_piece() -> None:
    answer = Answer(began=1.0)
    assert answer.told() == "nothing was said"
    answer.said("a", now=1.25, tokens=3)
    assert answer.told() == "first token 250 ms, 3 tokens"
    answer.said("b", now=2.25, tokens=13)
    answer.reason = "length"
    assert answer.told() == (
        "first token 250 ms, 13 tokens, 10.0 tokens/s, cut: the context is full"
    )


async def test_one_question_by_option_or_standard_input(live: Answering) -> None:
    status, out, err = await live.quantserve("chat", "--system", "brief", "--ask", "hi\x1b there")
    assert (status, out) == (0, "2 messages, hi\x1b there \n")  # a file gets it as it is
    assert TIMING.fullmatch(err.strip())
    piped = await live.quantserve("chat", "base", stdin="\xfc and é\n".encode())
    assert piped[:2] == (0, "1 messages, ü and é \n")


async def test_one_question_that_fails(live: Answering) -> None:
    assert "no question" in await live.refused("chat")
    assert "expected one of base" in await live.refused("chat", "nobody", "--ask", "hi")


async def test_an_interrupt_ends_a_question_and_its_request(live: Answering) -> None:
    process = await asyncio.create_subprocess_exec(
        QUANTSERVE, "chat", "--ask", "for ever", env=live.environment(),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    await process.stdout.readexactly(len("on and on"))
    process.terminate()
    _, err = await process.communicate()
    assert process.returncode == 2 and b"the answer was stopped" in err
    await asyncio.wait_for(live.chats.gone.wait(), 60)


async def test_a_conversation_in_a_terminal(live: Answering) -> None:
    async with terminal("chat", env=live.environment()) as shown:
        await shown.until("base> ")
        shown.type("for ever\n")
        await shown.until("on and on and")
        shown.type("\x03")  # stops the answer, not the chat
        assert "first token" in await shown.until("stopped")
        await asyncio.wait_for(live.chats.gone.wait(), 60)
        await shown.until("base> ")
        shown.type("half a line\x03")  # and at the prompt, the line
        await shown.until("base> ")
        shown.type("again\n")
        assert "3 messages, again" in await shown.until("base> ")
        for typed, told in (
            ("/clear", "forgotten"),
            ("/system be brief", "prompt set"),
            ("/model nobody", "expected one of base"),
            ("/model", "base"),
            ("/mdel", "there is no /mdel"),
            ("/help", "stops an answer"),
            (" /slash", "2 messages, /slash"),
            ("cut", "the server failed to answer"),
        ):
            shown.type(f"{typed}\n")
            assert told in await shown.until("base> "), typed
        shown.type("\x04")
        assert await shown.ended() == 0


async def test_a_terminal_is_not_moved_by_what_is_said(live: Answering) -> None:
    async with terminal("chat", env=live.environment()) as shown:
        await shown.until("base> ")
        shown.type("a\x16\x1b[2Jb\n")
        assert "messages, a[2Jb" in await shown.until("base> ")
        shown.process.terminate()
        assert await shown.ended() == 2 and "the chat ended" in shown.shown


async def test_a_signal_between_prompt_and_wait_is_not_lost() -> None:
    async with terminal("-c", BETWEEN, env=dict(os.environ), program=sys.executable) as shown:
        assert await shown.ended() == 1 and "ended" in shown.shown
