"""Whether a worker takes connections and who waits, as it tells its parent: of a real uvicorn."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn

from serve import http_limits
from serve.connections import Connections
from serve.http_limits import HttpLimits
from serve.listening import bind

ASKED = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


class Server:
    """Answers when it is let go."""

    def __init__(self) -> None:
        http = http_limits.protocol(HttpLimits())
        self.uvicorn = uvicorn.Server(
            uvicorn.Config(self, http=http, lifespan="off", log_level="error")
        )
        self.connections = Connections(lambda: self.uvicorn)
        self.let_go = asyncio.Event()
        self.port = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await receive()
        await self.let_go.wait()
        headers = [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"ok"})

    async def client(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)


@asynccontextmanager
async def running() -> AsyncIterator[Server]:
    listener = bind("127.0.0.1", 0)
    made = Server()
    made.port = listener.getsockname()[1]
    assert not made.connections.accepts()
    serving = asyncio.create_task(made.uvicorn.serve([listener]))
    await until(lambda: made.uvicorn.started)
    try:
        yield made
    finally:
        made.let_go.set()
        made.uvicorn.should_exit = True
        await serving


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_it_accepts_from_its_start_to_the_moment_it_is_told_to_end() -> None:
    async with running() as server:
        assert server.connections.accepts()
        server.uvicorn.should_exit = True
        assert not server.connections.accepts()


async def test_not_where_no_descriptor_is_left() -> None:
    async with running() as server:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, limits[1]))
        try:
            assert not server.connections.accepts()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("head", [b"", ASKED[:9], ASKED[:-2], ASKED])
async def test_whoever_it_has_taken_is_answered_after_it_takes_no_more(head: bytes) -> None:
    """From the connection on: closing it with anything unread would reset it."""
    async with running() as server:
        reader, writer = await server.client()
        writer.write(head)
        await until(lambda: server.connections.waiting() == 1)
        server.connections.stop()
        assert not server.connections.accepts() and server.connections.waiting() == 1
        writer.write(ASKED[len(head) :])
        server.let_go.set()
        assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        await until(lambda: server.connections.waiting() == 0)
        with pytest.raises(OSError):
            await server.client()
        writer.close()


async def test_a_client_between_two_requests_waits_for_nothing_and_is_let_go() -> None:
    async with running() as server:
        server.let_go.set()
        reader, writer = await server.client()
        writer.write(ASKED)
        await reader.readuntil(b"ok")
        await until(lambda: server.connections.waiting() == 0)
        server.connections.stop()
        assert await reader.read() == b""
        writer.close()
