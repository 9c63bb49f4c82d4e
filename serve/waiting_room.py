"""What the parent itself answers while no worker is ready: alive, not ready, come back soon.

Just enough HTTP for that, on the standard library: one request per connection, no bodies read.
"""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import suppress

from serve.errors import NotReady

HEAD_LIMIT = 64 << 10
HEAD_TIMEOUT_S = 5.0
LINGER_S = 0.5


async def open_on(listener: socket.socket) -> asyncio.Server:
    """Accept on a duplicate of `listener`; close the returned server to leave it to the worker."""
    return await asyncio.start_server(_answer, sock=listener.dup(), limit=HEAD_LIMIT)


async def answers(host: str, port: int, path: str) -> bool:
    """Whether GET `path` there answers 200 within a few seconds."""
    with suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
        async with asyncio.timeout(HEAD_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(
                f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
            )
            status = await reader.readline()
            writer.close()
            await writer.wait_closed()
            return b" 200 " in status
    return False


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        async with asyncio.timeout(HEAD_TIMEOUT_S):
            head = await reader.readuntil(b"\r\n\r\n")
            writer.write(response(head.split(b" ", 2)[1].split(b"?")[0].decode("latin-1")))
            await writer.drain()
            # Closing with unread bytes resets the connection and may lose the answer.
            writer.write_eof()
            with suppress(TimeoutError):
                await asyncio.wait_for(reader.read(HEAD_LIMIT), LINGER_S)
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()


def response(path: str) -> bytes:
    """The whole HTTP answer for `path`."""
    if path in ("/livez", "/health"):
        return _http("200 OK", {"status": "starting"})
    fault = NotReady("the model is loading; try again shortly")
    if path == "/readyz":
        return _http("503 Service Unavailable", {"status": "starting"})
    return _http("503 Service Unavailable", fault.body(), f"Retry-After: {fault.retry_after_s}\r\n")


def _http(status: str, body: object, headers: str = "") -> bytes:
    text = json.dumps(body).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n"
    return f"{head}{headers}Connection: close\r\n\r\n".encode() + text
