"""Whether a worker takes connections, as it tells its parent: a real uvicorn is asked."""

from __future__ import annotations

import asyncio
import resource
import socket

import uvicorn
from starlette.applications import Starlette

from serve.endpoints import _accepts
from serve.listening import bind


async def started(listener: socket.socket) -> tuple[uvicorn.Server, asyncio.Task[None]]:
    server = uvicorn.Server(uvicorn.Config(Starlette(), log_level="error"))
    assert not _accepts(server)
    serving = asyncio.create_task(server.serve([listener]))
    async with asyncio.timeout(60):
        while not server.started:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return server, serving


async def test_from_its_start_to_the_moment_it_is_told_to_end() -> None:
    server, serving = await started(bind("127.0.0.1", 0))
    assert _accepts(server)
    server.should_exit = True
    assert not _accepts(server)
    await serving


async def test_not_while_its_socket_is_closed() -> None:
    server, serving = await started(bind("127.0.0.1", 0))
    for listening in server.servers:
        listening.close()
    assert not _accepts(server)
    server.should_exit = True
    await serving


async def test_not_where_no_descriptor_is_left() -> None:
    server, serving = await started(bind("127.0.0.1", 0))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, limits[1]))
    try:
        assert not _accepts(server)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    server.should_exit = True
    await serving
