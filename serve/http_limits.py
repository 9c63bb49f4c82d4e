"""What a connection may cost before anybody knows whose it is: uvicorn's HTTP protocol, bounded.

uvicorn on httptools takes a request line and headers of any length, waits for them for ever, and
for a client that never reads. Here each has a limit; what is over it is answered as the API of its
path does, where HTTP still allows an answer, and closed. Time is looked at once a second for all
connections.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import socket
import struct
import sys
import time
from dataclasses import dataclass
from typing import Any, ClassVar
from uuid import uuid4

from httptools import HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serve.errors import (
    BadRequest,
    BodyTooLarge,
    HeadersTooLarge,
    LineTooLong,
    ServeError,
    TooManyConnections,
    TooSlow,
)
from serve.settings import Settings
from serve.wire import dialect_of, told_of

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
SAY_EVERY_S = 10.0  # one line of the log for however many connections were refused meanwhile
SPARE_DESCRIPTORS = 64  # for what is not a connection: files, sockets to the engine
LINGERING = 32  # refused connections that may wait for their client to read why


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Sizes in bytes, times in seconds. A body and an answer get `slowest_rate` on top."""

    line: int = 8 << 10
    headers: int = 64 << 10
    header_count: int = 100
    header_s: float = 10.0
    body: int = 32 << 20
    body_s: float = 30.0
    write_s: float = 30.0
    slowest_rate: int = 4 << 10  # bytes per second
    linger_s: float = 2.0
    connections: int = 4096
    root_path: str = ""


def limits_of(settings: Settings) -> HttpLimits:
    return HttpLimits(
        body=settings.max_body_bytes,
        write_s=settings.write_timeout,
        connections=settings.max_connections,
        root_path=settings.root_path.rstrip("/"),
    )


def raise_descriptors() -> None:
    """As many open files as the system lets this process have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def protocol(limits: HttpLimits) -> type[HttpToolsProtocol]:
    """The class for uvicorn's `http=` that holds every connection to `limits`."""
    return type("LimitedProtocol", (Bounded,), {"limits": limits, "watch": Watch(limits)})


class Watch:
    """Every open connection of a server, how many there may be, and a look at them each second."""

    def __init__(self, limits: HttpLimits) -> None:
        self.open: set[Bounded] = set()
        self._limits = limits
        self._room = limits.connections
        self._looking = False
        self._refused, self._said = 0, -SAY_EVERY_S

    def enter(self, connection: Bounded, loop: asyncio.AbstractEventLoop) -> bool:
        """Whether there is room for it. Starts the looks with the first."""
        self.open.add(connection)
        if not self._looking:
            self._looking = True
            self._room = min(self._limits.connections, _descriptors_left())
            loop.call_later(LOOK_EVERY_S, self._look, loop)
        return len(self.open) <= self._room

    def may_linger(self) -> bool:
        return len(self.open) <= self._room + LINGERING

    def busy(self) -> int:
        """Connections whose request, or its answer, is not whole."""
        return sum(connection.busy for connection in self.open)

    def close_idle(self) -> None:
        """Hang up on those that wait for their client's next request."""
        for connection in list(self.open):
            if not connection.busy:
                connection.transport.close()

    def refused(self) -> None:
        """Say it, at most once in a while."""
        self._refused += 1
        if time.monotonic() - self._said >= SAY_EVERY_S:
            logger.error(
                "refused %d connections: %d are open, and the limit is %d "
                "(QUANTSERVE_MAX_CONNECTIONS, and what `ulimit -n` allows)",
                self._refused, len(self.open), self._room,
            )  # fmt: skip
            self._refused, self._said = 0, time.monotonic()

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        for connection in list(self.open):
            connection.look(loop.time())
        self.say_if_descriptors_are_out()
        loop.call_later(LOOK_EVERY_S, self._look, loop)

    def say_if_descriptors_are_out(self) -> None:
        """The loop itself drops a connection that it has no descriptor for without a word."""
        try:
            os.close(os.open(os.devnull, os.O_RDONLY))
        except OSError as fault:
            if time.monotonic() - self._said >= SAY_EVERY_S:
                logger.error("new connections are dropped: %s", fault.strerror)  # noqa: TRY400
                self._said = time.monotonic()


def _descriptors_left() -> int:
    """Connections this process can have beside what it has open now."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/dev/fd"))
    return max(1, soft - used - SPARE_DESCRIPTORS - LINGERING)


class Bounded(HttpToolsProtocol):
    """One connection. Its clocks are None where there is nothing to wait for."""

    limits: ClassVar[HttpLimits]
    watch: ClassVar[Watch]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.url = b""  # of no request yet
        self._head_began: float | None = self.loop.time()
        self._body_began: float | None = None
        self._stuck_since: float | None = None
        self._refused_at: float | None = None
        self._fault: ServeError | None = None
        self._unparsed = 0  # bytes that the parser keeps, or has passed over, without a word
        self._heard = self._deaf = False
        self._head = self._body = 0
        if not self.watch.enter(self, self.loop):
            self.watch.refused()
            self._refuse(TooManyConnections("too many connections are open; try again shortly"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.watch.open.discard(self)
        super().connection_lost(exc)

    def handle_websocket_upgrade(self) -> None:
        self.watch.open.discard(self)
        super().handle_websocket_upgrade()

    def _should_upgrade(self) -> bool:
        """WebSockets begin with a GET without a body; the library behind leaves others open."""
        lengths = {b"content-length", b"transfer-encoding"}
        plain = lengths.isdisjoint(name for name, _ in self.headers)
        return bool(super()._should_upgrade()) and self.scope["method"] == "GET" and plain

    def _unsupported_upgrade_warning(self) -> None:
        """Another protocol is not spoken, and HTTP goes on: the parser would leave the body out.

        So what came is parsed again without the wish for another protocol.
        """
        fault = sys.exc_info()[1]
        rest = self._data[fault.args[0] :] if isinstance(fault, HttpParserUpgrade) else b""
        head = [self.scope["method"].encode(), b" ", self.url, b" HTTP/1.1\r\n"]
        for name, value in self.headers:
            if name not in (b"upgrade", b"http2-settings"):
                head += [name, b": ", value, b"\r\n"]
        self.parser = HttpRequestParser(self)
        self.data_received(b"".join([*head, b"\r\n", rest]))

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return  # read and dropped: closing now would reset what the client has yet to read
        self._data = data
        self._heard = True
        if self._head_began is None and self._body_began is None:
            self._head_began = self.loop.time()
        self._unparsed += len(data)
        super().data_received(data)
        if self._unparsed > self.limits.headers and not self._deaf:
            self._refuse(self._too_large())

    # What the parser calls. A fault is raised out of it and comes back in `send_400_response`.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head = self._body = 0
        self._head_began = self._head_began or self.loop.time()

    def on_url(self, url: bytes) -> None:
        self._unparsed -= len(url)
        if len(self.url) + len(url) > self.limits.line:
            self._raise(LineTooLong(f"the request line is longer than {self.limits.line} bytes"))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._unparsed -= len(name) + len(value)
        self._head += len(name) + len(value)
        if self._head > self.limits.headers or len(self.headers) >= self.limits.header_count:
            self._raise(self._too_large())
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._unparsed = 0
        self._head_began = None
        self._body_began = self.loop.time()
        self.scope["method"] = self.parser.get_method().decode()
        self._check_framing()
        if self.parser.should_upgrade() and not self._should_upgrade():
            return  # it comes again, without the wish for another protocol
        super().on_headers_complete()

    def _check_framing(self) -> None:
        """Where proxies and servers read a request differently, one can be smuggled in another."""
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            self._raise(BadRequest(f"HTTP/{version} is not spoken here; send HTTP/1.1"))
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (hosts == 0 and version == "1.1"):
            self._raise(BadRequest(f"the request has {hosts} Host headers; send one"))
        for name, value in self.headers:
            if name == b"content-length" and int(value) > self.limits.body:
                self._raise(self._body_too_large())
            if name == b"transfer-encoding" and value.strip().lower() != b"chunked":
                told = ascii(value[:40].decode("latin-1"))
                self._raise(BadRequest(f"Transfer-Encoding is {told}; send chunked, or a length"))

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        self._body += len(body)
        if self._body > self.limits.body:
            self._raise(self._body_too_large())
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unparsed = 0
        self._body_began = None
        if not self.parser.should_upgrade() or self._should_upgrade():
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._fault or BadRequest(f"{msg} Send HTTP/1.1"))

    @property
    def busy(self) -> bool:
        """Whether a request is coming in or may be on its way, or an answer is not out yet."""
        answering = self.cycle is not None and not self.cycle.response_complete
        asking = self._head_began is not None or self._body_began is not None
        return answering or asking or self.transport.get_write_buffer_size() > 0

    def look(self, now: float) -> None:
        """End what has been waited for too long."""
        if self._is_stuck(now):
            self._reset()
        elif self._deaf:  # told why, or its last answer is under way
            if self._refused_at is not None and now - self._refused_at > self.limits.linger_s:
                self.transport.close()
        else:
            self._look_at_request(now)

    def _look_at_request(self, now: float) -> None:
        limits = self.limits
        if self._head_began is not None and now - self._head_began > limits.header_s:
            self._late(f"no whole request came within {limits.header_s:g} s")
        elif self._body_began is not None:
            if self.flow.read_paused:  # we are the slower one
                self._body_began, self._body = now, 0
            elif now - self._body_began > limits.body_s + self._body / limits.slowest_rate:
                self._late(f"the body came slower than {limits.slowest_rate} bytes a second")

    def _is_stuck(self, now: float) -> bool:
        """Whether nobody reads what has been written, and nothing more can be written."""
        waiting = self.transport.get_write_buffer_size()
        answered = self.cycle is None or self.cycle.response_complete
        if not waiting or not (self.flow.write_paused or answered or self.transport.is_closing()):
            self._stuck_since = None
            return False
        if self._stuck_since is None:
            self._stuck_since = now + waiting / self.limits.slowest_rate
        return now - self._stuck_since > self.limits.write_s

    def _reset(self) -> None:
        """Drop the connection and what is still to be sent; its request is cancelled with it.

        Without the option the kernel would keep what it has for a client that does not take it.
        """
        found = self.transport.get_extra_info("socket")
        found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def _late(self, message: str) -> None:
        if self._heard:
            self._refuse(TooSlow(message))
        else:
            self.transport.close()

    def _too_large(self) -> HeadersTooLarge:
        limits = self.limits
        return HeadersTooLarge(
            f"the request has more than {limits.header_count} headers or {limits.headers} bytes "
            "of them"
        )

    def _body_too_large(self) -> BodyTooLarge:
        return BodyTooLarge(
            f"the body is larger than {self.limits.body} bytes, which this server takes at most "
            "(QUANTSERVE_MAX_BODY_BYTES)"
        )

    def _raise(self, fault: ServeError) -> None:
        self._fault = fault
        raise fault

    def _refuse(self, fault: ServeError) -> None:
        """Answer, say that nothing more will come, and read on for a while.

        A request that came whole before this one is answered, and that is then the last: nothing
        can be put into the middle of its answer.
        """
        self._deaf = True
        self._unset_keepalive_if_required()
        cycle = self.cycle
        under_way = cycle is not None and not cycle.response_complete
        if under_way and not cycle.more_body:
            cycle.keep_alive = False
            return
        if under_way and (cycle.response_started or self.pipeline):
            self.transport.close()  # it will never have the rest
            return
        if under_way:
            cycle.disconnected = True
            cycle.message_event.set()
        self._refused_at = self.loop.time()
        path = self.url.partition(b"?")[0].decode("latin-1")
        self.transport.write(answer(fault, path.removeprefix(self.limits.root_path)))
        if self.watch.may_linger() and self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()


def answer(fault: ServeError, path: str) -> bytes:
    """The whole HTTP answer of an error, after which the connection is closed."""
    request_id = uuid4().hex
    body = json.dumps(dialect_of(path).body(told_of(fault), request_id)).encode()
    headers: dict[str, Any] = {
        "content-type": "application/json",
        "content-length": len(body),
        "connection": "close",
        "x-request-id": request_id,
    }
    if fault.retry_after_s is not None:
        headers["retry-after"] = fault.retry_after_s
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return STATUS_LINE[fault.status] + f"{lines}\r\n".encode() + body
