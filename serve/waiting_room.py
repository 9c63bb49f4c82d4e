"""What the parent itself answers while no worker accepts: alive, not ready, come back soon.

Just enough HTTP for that, on the standard library: one request per connection, of which only the
head is read. Whatever else comes in is closed on, after a few seconds at most; where all places are
taken the oldest connection makes room, so that a probe is always answered.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit
from uuid import uuid4

from serve.errors import BadRequest, NotReady, ServeError
from serve.listening import BACKLOG
from serve.wire import dialect_of, told_of

HEAD_BYTES = 64 << 10
HEAD_TIMEOUT_S = 5.0
LINGER_S = 2.0
LAST_ANSWERS_S = 0.3
LINGER_BYTES = 64 << 20
PLACES = 256
EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"

# The Authorization header -> the parent's own metrics; a ServeError where the key does not allow it
Metrics = Callable[[str | None], bytes]


@dataclass(frozen=True, slots=True)
class Asked:
    """The head of a request, as far as it matters here; `path` is tidied."""

    method: str
    path: str
    authorization: str | None = None


class WaitingRoom:
    """Opens and closes on one listening socket; `fault` is what all but health probes are told."""

    def __init__(
        self,
        listener: socket.socket,
        metrics: Metrics,
        *,
        encryption: ssl.SSLContext | None = None,
        root_path: str = "",
    ) -> None:
        self._listener, self._metrics = listener, metrics
        self._encryption, self._root_path = encryption, root_path.rstrip("/")
        self._server: asyncio.Server | None = None
        self._seated: dict[asyncio.Task[None], None] = {}  # oldest first
        self.fault: ServeError = NotReady("the model is loading; try again shortly")

    @property
    def is_open(self) -> bool:
        return self._server is not None

    async def open(self) -> None:
        """Accept, beside a worker or without one. OSError when the system has nothing left."""
        if self._server is None:
            handshake_s = HEAD_TIMEOUT_S if self._encryption else None
            self._server = await asyncio.start_server(
                self._seat,
                sock=self._listener.dup(),
                limit=HEAD_BYTES,
                backlog=BACKLOG,
                ssl=self._encryption,
                ssl_handshake_timeout=handshake_s,
            )

    def close(self) -> None:
        """Leave the socket to the worker; who has been let in is still answered."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def clear(self) -> None:
        """Close, and let everybody go, who is being answered a moment later."""
        self.close()
        if self._seated:
            await asyncio.wait(self._seated, timeout=LAST_ANSWERS_S)
        for task in list(self._seated):
            task.cancel()
        await asyncio.gather(*self._seated, return_exceptions=True)

    def _seat(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while len(self._seated) >= PLACES:
            oldest = next(iter(self._seated))
            oldest.cancel()
            del self._seated[oldest]
        task = asyncio.create_task(self._answer(reader, writer))
        self._seated[task] = None

        def leave(done: asyncio.Task[None]) -> None:
            self._seated.pop(done, None)
            writer.close()

        task.add_done_callback(leave)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, TimeoutError, EOFError, asyncio.LimitOverrunError):
            async with asyncio.timeout(HEAD_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(self.response(head))
                await writer.drain()
            await _linger(reader, writer)

    def response(self, head: bytes) -> bytes:
        """The whole HTTP answer to a request that begins so."""
        asked = parse(head, self._root_path)
        if asked is None:
            return http(BadRequest("this is no HTTP/1 request"), "/")
        answer = self._answer_to(asked)
        return answer[: answer.index(b"\r\n\r\n") + 4] if asked.method == "HEAD" else answer

    def _answer_to(self, asked: Asked) -> bytes:
        if asked.path == "/livez":
            return page("200 OK", json.dumps({"status": "alive"}).encode())
        if asked.path == "/metrics" and asked.method in ("GET", "HEAD"):
            try:
                return page("200 OK", self._metrics(asked.authorization), EXPOSITION)
            except ServeError as fault:
                return http(fault, asked.path)
        return http(self.fault, asked.path)


def parse(head: bytes, root_path: str = "") -> Asked | None:
    """None where it is no request of HTTP/1."""
    line, *headers = head.lstrip(b"\r\n").decode("latin-1").split("\r\n")
    method, _, rest = line.partition(" ")
    target, _, version = rest.rpartition(" ")
    if not method.isalpha() or not target or not version.startswith("HTTP/1."):
        return None
    if target.lower().startswith(("http://", "https://")):  # the whole address, as for a proxy
        target = urlsplit(target).path
    parts = (part for part in unquote(target.partition("?")[0]).split("/") if part)
    path = "/" + "/".join(parts)
    if root_path and path.startswith(f"{root_path}/"):
        path = path.removeprefix(root_path)
    named = (header.partition(":") for header in headers)
    keys = (value.strip() for name, _, value in named if name.lower() == "authorization")
    return Asked(method.upper(), path, next(keys, None))


def http(fault: ServeError, path: str) -> bytes:
    """An error, in the shape of the API that `path` belongs to."""
    statuses = {400: "Bad Request", 401: "Unauthorized", 403: "Forbidden"}
    status = f"{fault.status} {statuses.get(fault.status, 'Service Unavailable')}"
    request_id = uuid4().hex
    headers = f"X-Request-Id: {request_id}\r\n"
    if fault.retry_after_s is not None:
        headers += f"Retry-After: {fault.retry_after_s}\r\n"
    body = dialect_of(path).body(told_of(fault), request_id)
    return page(status, json.dumps(body).encode(), headers=headers)


def page(status: str, body: bytes, kind: str = "application/json", headers: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
    return f"{head}{headers}Connection: close\r\n\r\n".encode() + body


async def _linger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Closing with unread bytes resets the connection and may lose the answer."""
    if writer.can_write_eof():
        writer.write_eof()
    left = LINGER_BYTES
    async with asyncio.timeout(LINGER_S):
        while left > 0 and (read := await reader.read(HEAD_BYTES)):
            left -= len(read)
