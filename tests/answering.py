"""A server to ask over real HTTP: our gate and routes around the fakes' engine, without vLLM.

What answers a chat is a stand-in, and so are the two lines of vLLM's metrics; the real ones are
asked in tests/e2e/test_client.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, StreamingResponse

from serve import admin, health
from serve.access import Gate
from serve.errors import ServeError
from serve.serving import Serving

QUANTSERVE = str(Path(sys.executable).with_name("quantserve"))
KEY = "sk-ops-0123456789"
HANG_S = 300.0


@dataclass
class Chats:
    """The stand-in: says how many messages there were and the last of them, word by word.

    Some questions are orders: see `pieces`.
    """

    asked: list[dict[str, Any]] = field(default_factory=list)
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, request: Request) -> StreamingResponse:
        body = await request.json()
        self.asked.append(body)
        endless = body["messages"][-1]["content"] == "for ever"
        pieces = self._for_ever() if endless else self.pieces(body)
        return StreamingResponse(pieces, media_type="text/event-stream")

    async def _for_ever(self) -> AsyncIterator[bytes]:
        try:
            while True:
                yield _event("on and ", 1)
                await asyncio.sleep(0.01)
        finally:
            self.gone.set()

    async def pieces(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        question = body["messages"][-1]["content"]
        text = f"{len(body['messages'])} messages, {question}"
        events = [_event(tokens=0), *(_event(f"{w} ", n) for n, w in enumerate(text.split(), 1))]
        whole = [*events, _event(tokens=4, reason="stop"), b": a comment\n\n", b"data: [DONE]\n\n"]
        match question:
            case "think":
                whole = [_event("hm ", 1, name="reasoning"), *whole[1:]]
            case "cut":
                whole = events
            case "fault":
                whole = [*events, b'data: {"error": {"message": "the engine\\n has ended"}}\n\n']
            case "bytes é":  # CRLF, and each byte by itself
                whole = [bytes([b]) for b in b"".join(whole).replace(b"\n", b"\r\n")]
            case "lump":
                whole = [b"".join(whole).replace(b"\n", b"\r")]
        for piece in whole:
            yield piece
            await asyncio.sleep(0)


def _event(
    content: str = "", tokens: int = 1, reason: str | None = None, name: str = "content"
) -> bytes:
    choice = {"index": 0, "delta": {name: content}, "finish_reason": reason}
    told = {"choices": [choice], "usage": {"completion_tokens": tokens}}
    return f"data: {json.dumps(told, ensure_ascii=False)}\n\n".encode()


@dataclass
class Answering:
    """A server that runs, and the command line that asks it."""

    url: str
    serving: Serving
    chats: Chats

    async def quantserve(
        self, *words: str | Path, stdin: bytes = b"", **env: str
    ) -> tuple[int, str, str]:
        """The exit status, stdout and stderr of a command."""
        process = await asyncio.create_subprocess_exec(
            QUANTSERVE, *map(str, words), env=self.environment(**env),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await asyncio.wait_for(process.communicate(stdin), HANG_S)
        assert b"Traceback" not in err, err.decode()
        return process.returncode or 0, out.decode(), err.decode()

    async def refused(self, *words: str | Path, **env: str) -> str:
        """The one line of a command that fails, behind what it said on its way."""
        status, out, err = await self.quantserve(*words, stdin=b"", **env)
        assert (status, out) == (2, ""), (status, out, err)
        return err.splitlines()[-1].removeprefix("quantserve: ")

    def environment(self, **env: str) -> dict[str, str]:
        told = {"QUANTSERVE_SERVER": self.url, "QUANTSERVE_API_KEY": KEY}
        return {**os.environ, **told, **env}


@asynccontextmanager
async def answering(
    serving: Serving, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Answering]:
    """On a free port of loopback."""
    from serve import endpoints  # imports vLLM

    app, chats = FastAPI(), Chats()
    app.include_router(admin.routes(app))
    app.include_router(health.routes(serving.fault))
    app.include_router(endpoints._model_routes(app))
    app.add_api_route("/v1/chat/completions", chats.answer, methods=["POST"])
    app.add_api_route("/metrics", _metrics)
    app.add_exception_handler(ServeError, endpoints.answer_error)
    app.add_middleware(Gate)
    app.state.quantserve = serving
    config = SimpleNamespace(max_model_len=2048)
    app.state.openai_serving_models = SimpleNamespace(model_config=config)
    made = uvicorn.Config(app, lifespan="off", log_level="error", timeout_graceful_shutdown=1)
    made.load()
    made.ssl = tls
    server = uvicorn.Server(made)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        running = asyncio.create_task(server.serve([listener]))
        scheme = "https" if tls else "http"
        try:
            yield Answering(f"{scheme}://127.0.0.1:{listener.getsockname()[1]}", serving, chats)
        finally:
            server.should_exit = True
            await running


@asynccontextmanager
async def speaking(status: int, body: bytes | dict[str, Any], **headers: str) -> AsyncIterator[str]:
    """The URL of something that answers everything so."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = {"content-length": str(len(content)), "connection": "close", **headers}
    lines = [f"HTTP/1.1 {status} Said", *(f"{name}: {value}" for name, value in head.items())]

    taken: set[asyncio.Task[Any]] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        taken.add(task)
        with closing(writer), suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write("\r\n".join([*lines, "", ""]).encode() + content)
            await writer.drain()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    await asyncio.gather(*taken)


def _metrics() -> PlainTextResponse:
    rows = 'vllm:num_requests_running{engine="0"} 2.0\nvllm:num_requests_running{engine="1"} 1.0'
    return PlainTextResponse(f"# HELP\n{rows}\nvllm:num_requests_waiting 0.0\n")


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, process: asyncio.subprocess.Process, fd: int) -> None:
        self.process, self._fd = process, fd
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    async def until(self, text: str) -> str:
        """What it showed up to `text`, since it was asked the last time."""
        async with asyncio.timeout(HANG_S):
            while text not in self.shown:
                self.shown += (await asyncio.to_thread(os.read, self._fd, 4096)).decode()
        before, _, self.shown = self.shown.partition(text)
        return before

    async def ended(self) -> int:
        """Its exit status, all it showed read."""
        async with asyncio.timeout(HANG_S):
            with suppress(OSError):  # EIO: nobody has the other end any more
                while piece := await asyncio.to_thread(os.read, self._fd, 4096):
                    self.shown += piece.decode()
            return await self.process.wait()


@asynccontextmanager
async def terminal(
    *words: str, env: dict[str, str], program: str = QUANTSERVE
) -> AsyncIterator[Terminal]:
    """`quantserve WORDS`, or another program, killed when the block is left."""
    ours, theirs = os.openpty()
    try:
        process = await asyncio.create_subprocess_exec(
            program, *words, env={**env, "TERM": "dumb"},
            stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=lambda: os.login_tty(0),
        )  # fmt: skip
    finally:
        os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(ours)
