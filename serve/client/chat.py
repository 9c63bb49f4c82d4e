"""A conversation with a model that is served: streamed answers, and what each of them took."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from quant.interrupt import Interrupted
from serve.client import models
from serve.client.connection import Address, Connection, ServerError, Signals, plain, tame

COMPLETIONS = "/v1/chat/completions"
HELP = """\
/model ALIAS   talk to another model; alone: which there are
/system TEXT   set the system prompt; alone: none
/clear         forget the conversation
/help          this
/quit          end; so does Ctrl-D
Ctrl-C stops an answer. A blank in front sends a line that begins with a slash."""


@dataclass
class Answer:
    """What was said, and when, in seconds of one clock.

    A server that is short of time sends several tokens in a piece; `head` are the first piece's.
    """

    began: float
    text: str = ""
    first: float | None = None
    last: float = 0.0
    tokens: int = 0
    head: int = 0
    reason: str | None = None

    def said(self, piece: str, now: float, tokens: int) -> None:
        """A piece that came now; `tokens` in all so far, 0 where the server does not count."""
        self.text += piece
        self.tokens = max(tokens, self.tokens)
        if self.first is None:
            self.first, self.head = now, self.tokens
        self.last = now

    def told(self) -> str:
        """Time to the first token, tokens, and the rate of those after the first piece."""
        if self.first is None:
            return "nothing was said"
        parts = [f"first token {1e3 * (self.first - self.began):.0f} ms"]
        if self.tokens:
            parts.append(f"{self.tokens} token{'s' * (self.tokens != 1)}")
        took, rest = self.last - self.first, self.tokens - self.head
        if took > 0 and rest > 0:
            parts.append(f"{rest / took:.1f} tokens/s")
        if self.reason == "length":
            parts.append("cut: the context is full")
        return ", ".join(parts)


@dataclass
class Chat:
    """Who is asked, and what was said so far. `show` gets the text as it comes."""

    connection: Connection
    model: str
    system: str
    show: Callable[[str], None]
    messages: list[dict[str, str]] = field(default_factory=list)

    async def ask(self, question: str, answer: Answer) -> None:
        """Fill `answer`. The conversation keeps the turn if anything was said, stopped or not."""
        turn = {"role": "user", "content": question}
        system = [{"role": "system", "content": self.system}] if self.system else []
        body = {
            "model": self.model,
            "messages": [*system, *self.messages, turn],
            "stream": True,
            # Of every piece, so that an answer that is stopped is counted, too.
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        try:
            async for event in self.connection.events(COMPLETIONS, body):
                self._take(event, answer)
        finally:
            if answer.text:
                self.messages += [turn, {"role": "assistant", "content": answer.text}]

    def _take(self, event: dict[str, Any], answer: Answer) -> None:
        usage, choices = event.get("usage"), event.get("choices")
        count = usage.get("completion_tokens") if isinstance(usage, dict) else 0
        tokens = count if isinstance(count, int) else 0
        choice = choices[0] if isinstance(choices, list) and choices else {}
        delta = choice.get("delta") if isinstance(choice, dict) else None
        piece = delta.get("content") if isinstance(delta, dict) else None
        if isinstance(piece, str) and piece:
            answer.said(piece, time.monotonic(), tokens)
            self.show(piece)
        if isinstance(choice, dict):
            answer.reason = choice.get("finish_reason") or answer.reason
        answer.tokens = max(tokens, answer.tokens)


async def once(to: Address, model: str | None, system: str, question: str) -> str:
    """Write the answer to one question to stdout; returns what it took."""
    async with Connection(to) as connection:
        chat = Chat(connection, await models.chosen(connection, model), system, write)
        answer = Answer(time.monotonic())
        await chat.ask(question, answer)
        write("\n")
        return answer.told()


def talk(to: Address, model: str | None, system: str, line: Callable[[str], str]) -> None:
    """Ask until the user ends it; `line` reads a line behind a prompt.

    A fault of the server's is a line, and the conversation goes on; before it began, a ServerError.
    SIGTERM is Interrupted.
    """
    with Signals() as signals, asyncio.Runner() as runner:
        connection = Connection(to)
        try:
            chat = Chat(connection, runner.run(models.chosen(connection, model)), system, write)
            say(f"{plain(chat.model)} at {to.url}; /help, Ctrl-D ends")
            with suppress(EOFError):
                while not signals.terminated:
                    _turn(chat, runner, line)
        except KeyboardInterrupt:
            signals.terminated = True
        finally:
            runner.run(connection.__aexit__())
        if signals.terminated:
            stopped = Interrupted()
            stopped.add_note("the chat ended")
            raise stopped


def _turn(chat: Chat, runner: asyncio.Runner, line: Callable[[str], str]) -> None:
    """Do what is typed next, or nothing on Ctrl-C. EOFError ends the conversation."""
    try:
        typed = line(f"{plain(chat.model)}> ")
    except (KeyboardInterrupt, EOFError) as end:
        write("\n")
        if isinstance(end, EOFError):
            raise
        return
    try:
        if typed.startswith("/"):
            runner.run(_command(chat, typed))
        elif typed.strip():
            _answer(chat, runner, typed.strip())
    except ServerError as fault:
        say(str(fault))
    except KeyboardInterrupt:
        say("stopped")


def _answer(chat: Chat, runner: asyncio.Runner, question: str) -> None:
    answer = Answer(time.monotonic())
    try:
        runner.run(chat.ask(question, answer))
    finally:  # also where it was stopped, or broke off
        if answer.text:
            write("\n")
            say(answer.told())


async def _command(chat: Chat, typed: str) -> None:
    name, _, rest = typed.partition(" ")
    rest = rest.strip()
    if name == "/model" and rest:
        chat.model = await models.chosen(chat.connection, rest)
    elif name == "/model":
        say(", ".join(await models.names(chat.connection)))
    elif name == "/system":
        chat.system = rest
        say("system prompt set" if rest else "no system prompt")
    elif name == "/clear":
        chat.messages.clear()
        say("the conversation is forgotten")
    elif name == "/help":
        say(HELP)
    elif name in ("/quit", "/exit", "/bye"):
        raise EOFError
    else:
        say(f"there is no {plain(name)}; /help says what there is")


def write(piece: str) -> None:
    """On stdout, at once; a terminal gets nothing that moves it."""
    if sys.stdout.isatty():
        piece = tame(piece)
    sys.stdout.write(piece)
    sys.stdout.flush()


def say(text: str) -> None:
    """About the answers, on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
