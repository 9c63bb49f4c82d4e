"""A conversation with a model that is served: streamed answers, and what each of them took."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from quant.interrupt import Interrupted
from serve.client import models
from serve.client.connection import Address, Connection, ServerError, Signals, plain, tame

TICK_S = 0.25
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
    """Who is asked, and what was said so far.

    `show` gets the answer's text as it comes, `thoughts` what a model thinks before it answers.
    """

    connection: Connection
    model: str
    system: str
    show: Callable[[str], None]
    thoughts: Callable[[str], None] = lambda _: None
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
        first = choices[0] if isinstance(choices, list) and choices else None
        choice: dict[str, Any] = first if isinstance(first, dict) else {}
        thought, piece = _text(choice, "reasoning"), _text(choice, "content")
        if piece and not answer.text and answer.first is not None:
            self.thoughts("\n\n")
        if thought or piece:
            answer.said(piece, time.monotonic(), tokens)
        if thought:
            self.thoughts(thought)
        if piece:
            self.show(piece)
        answer.reason = choice.get("finish_reason") or answer.reason
        answer.tokens = max(tokens, answer.tokens)


def _text(choice: dict[str, Any], name: str) -> str:
    delta = choice.get("delta")
    text = delta.get(name) if isinstance(delta, dict) else None
    return text if isinstance(text, str) else ""


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
            found = runner.run(models.chosen(connection, model))
            chat = Chat(connection, found, system, write, mutter)
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
        with ticking():
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


@contextmanager
def ticking() -> Iterator[None]:
    """Has signals noticed while a line is typed.

    readline does not see one that comes between its prompt and its wait, until something wakes it.
    """
    before = signal.signal(signal.SIGALRM, lambda _number, _frame: None)
    signal.setitimer(signal.ITIMER_REAL, TICK_S, TICK_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _answer(chat: Chat, runner: asyncio.Runner, question: str) -> None:
    answer = Answer(time.monotonic())
    try:
        runner.run(chat.ask(question, answer))
    finally:  # also where it was stopped, or broke off
        if answer.first is not None:
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


def mutter(piece: str) -> None:
    """On stderr, as it comes: where stdout is a file, the answers alone go there."""
    sys.stderr.write(tame(piece))
    sys.stderr.flush()


def say(text: str) -> None:
    """About the answers, on stderr."""
    mutter(text + "\n")
