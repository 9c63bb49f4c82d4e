"""The way out of one request: request id, version header, error shape, first token, the books.

Answers pass through untouched unless they are errors, which leave in the shape of their API
(serve/wire.py), inside streams as well. The status of a stream is held back until its first event:
it may still be refused, with a status that says so. A request is counted once, when its answer
ends, by how it ended.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect

from serve.errors import Draining, EngineDied, ServeError
from serve.metrics import NO_ALIAS, outcome_of
from serve.turn import Turn
from serve.wire import (
    OPENAI,
    Told,
    dialect_of,
    error_event,
    has_several,
    read_error,
    told_of,
    with_field,
)

if TYPE_CHECKING:
    from serve.serving import Serving

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]

logger = logging.getLogger(__name__)

ERROR_BODY_LIMIT = 1 << 20  # bytes of an error's body that are read; the rest is dropped
RETRY_AFTER_S = 2  # of a 429 or 503 that does not say it itself
GONE = (OSError, ClientDisconnect)  # what an app raises when its client has left
ENGINE_DIED = "the engine ended while it worked on this request; send it again"


class Answer:
    """One request's answer on its way to the client; `counted` in the request metrics or not.

    `bare` answers (probes) keep the bodies they have.
    """

    def __init__(self, serving: Serving, turn: Turn, path: str, send: Send) -> None:
        self._serving, self.turn, self._path, self._to_client = serving, turn, path, send
        self.counted = self.bare = False
        self._dialect = dialect_of(path)
        self._ends = self._dialect.ends
        self._start: Message | None = None  # held back
        self._body = b""  # of an error
        self._began = self._streams = self._over = self._left = self._booked = False
        self._first = self._whole = False  # first token sent; the stream's last event seen
        self._events = 0
        self._broken: Told | None = None  # the error that a stream carried

    async def run(self, app: Callable[[Receive, Send], Awaitable[None]], receive: Receive) -> None:
        """Let `app` answer, and see to it that the client gets an end, whatever `app` does.

        Returns normally also where the server gives up the request: it has been told by then.
        """

        async def hear() -> Message:
            message = await receive()
            self._left |= message["type"] == "http.disconnect" and not self._over
            return message

        async def work() -> None:
            await app(hear, self.send)

        task = asyncio.ensure_future(work())
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:  # uvicorn's, when a drain has lasted too long
            task.cancel()
            await self.end(Draining("this server stops; send the request to another"))
            await asyncio.wait({task})
        fault = None if task.cancelled() else task.exception()
        if fault is not None and not (self._left and isinstance(fault, GONE)):
            logger.error("request %s failed: %r", self.turn.id, fault, exc_info=fault)
        await self._close()

    async def _send(self, message: Message) -> None:
        try:
            await self._to_client(message)
        except OSError:  # how some servers say that the client has left
            self._left = True
            raise

    async def send(self, message: Message) -> None:
        """ASGI's `send` for the app behind."""
        if self._over:
            return
        if message["type"] == "http.response.start":
            self._start = message
            self._streams = _is_stream(message)
            failed = message["status"] >= 400 and not self.bare
            if self.turn.fault is not None and not self.bare:
                await self.end(self.turn.fault)
            elif not failed and not self._streams:
                await self._begin()
        elif self._start is not None and self._start["status"] >= 400:
            await self._collect(message)
        else:
            await self._pass(message)

    async def end(self, fault: ServeError) -> None:
        """Answer with an error of ours: as a whole where nothing was sent, else as last event."""
        await self._end(told_of(fault))

    async def _end(self, told: Told, headers: Any = ()) -> None:
        if self._over:
            return
        if self._began:
            await self._break_off(told)
            return
        self._over = True
        body = json.dumps(self._dialect.body(told, self.turn.request_id)).encode()
        dropped = (b"content-length", b"content-type")
        kept = [pair for pair in self._dressed(headers) if pair[0].lower() not in dropped]
        kept.append((b"content-type", b"application/json"))
        kept.append((b"content-length", str(len(body)).encode()))
        kept += _advice(told, {name.lower() for name, _ in kept})
        self._book(outcome_of(told.status, refuses=told.refuses), told)
        await self._send({"type": "http.response.start", "status": told.status, "headers": kept})
        await self._send({"type": "http.response.body", "body": body})

    async def _break_off(self, told: Told) -> None:
        """The end of an answer that has begun. Only a stream can say why."""
        self._over = True
        self._book("stream_error" if self._streams else "server_error", told)
        if self._streams:
            event = self._dialect.event(told, self.turn.request_id, self._events)
            await self._send({"type": "http.response.body", "body": event, "more_body": True})
            await self._send({"type": "http.response.body", "body": b""})

    async def _collect(self, message: Message) -> None:
        """An error's body; all of it is needed to tell it anew."""
        assert self._start is not None
        if len(self._body) < ERROR_BODY_LIMIT:
            self._body += message.get("body", b"")
        if message.get("more_body"):
            return
        status, headers = self._start["status"], self._start.get("headers", ())
        if status >= 500 and self._serving.engine_dead():
            await self.end(EngineDied(ENGINE_DIED))
        else:
            told = read_error(status, self._body, self._path)
            await self._end(with_field(told, self.turn.asked), headers)

    async def _pass(self, message: Message) -> None:
        body = message.get("body", b"")
        if self._streams and body:
            told = error_event(body)
            if told is not None:
                told, body = self._retold(told, body)
                if not self._began:
                    await self._end(told)
                    return
                message["body"] = body
            self._note(body)
        last = not message.get("more_body")
        if last and self._lacks_its_end():
            await self._end(self._abrupt())
            return
        if not self._began and (body or last):
            await self._begin()
        if last:
            self._over = True
            self._book("stream_error" if self._broken else "ok", self._broken)
        if self._began:
            await self._send(message)

    def _retold(self, told: Told, body: bytes) -> tuple[Told, bytes]:
        """The error of a stream, as we say it; what else came in the same piece stays."""
        if self.turn.fault is not None:
            told = told_of(self.turn.fault)
        elif told.status >= 500 and self._serving.engine_dead():
            told = told_of(EngineDied(ENGINE_DIED))
        told = with_field(told, self.turn.asked)
        self._broken = told
        event = self._dialect.event(told, self.turn.request_id, self._events)
        before, _, rest = body.partition(b"\n\n")
        while rest and error_event(before) is None:
            event, (before, _, rest) = before + b"\n\n" + event, rest.partition(b"\n\n")
        return told, event + rest

    def _note(self, body: bytes) -> None:
        if body.startswith(b":"):  # a comment that keeps the connection open
            return
        self._events += 1
        if body.startswith(self._ends):
            self._whole = True
        elif has_several(body):
            self._whole |= any(b"\n" + end in body for end in self._ends)
        if not self._first:
            self._first = True
            waited = time.monotonic() - self.turn.began
            self._serving.metrics.ttft.labels(self._alias()).observe(waited)

    async def _begin(self) -> None:
        assert self._start is not None
        start, self._start, self._began = self._start, None, True
        start["headers"] = self._dressed(start.get("headers", ()))
        await self._send(start)

    async def _close(self) -> None:
        """The app has returned: whatever has no end yet gets one."""
        if self._over:
            return
        if not (self._left or self._whole or self._broken):
            await self._end(self._abrupt())
            return
        self._over = True
        self._book("stream_error" if self._broken else "ok", self._broken)
        if not self._left:
            await self._send({"type": "http.response.body", "body": b""})

    def _lacks_its_end(self) -> bool:
        known = self._streams and bool(self._dialect.ends)
        return known and not (self._whole or self._broken or self._left)

    def _abrupt(self) -> Told:
        ended = self._serving.engine_dead()
        return told_of(EngineDied(ENGINE_DIED) if ended else ServeError(""))

    def _dressed(self, headers: Any) -> list[tuple[bytes, bytes]]:
        kept = [pair for pair in headers if pair[0].lower() != b"x-request-id"]
        kept.append((b"x-request-id", self.turn.request_id.encode("latin-1")))
        if self._dialect.body is not OPENAI.body:
            kept.append((b"request-id", self.turn.request_id.encode("latin-1")))
        if self.turn.version is not None:
            kept.append((b"x-quantserve-adapter", self.turn.version.name.encode()))
        kept += [(b"x-quantserve-warning", text.encode()) for text in self.turn.warnings]
        return kept

    def _book(self, outcome: str, told: Told | None) -> None:
        """Once per request. Of a client that left early nobody knows what it got."""
        if self._booked or not self.counted:
            return
        self._booked = True
        if self._left and not (self._whole or self._broken):
            outcome = "client_gone"
        metrics, version = self._serving.metrics, self.turn.version
        metrics.requests.labels(self._alias(), outcome).inc()
        if told is not None and outcome != "client_gone":
            metrics.errors.labels(self._alias(), told.code).inc()
        route = self._serving.pool.get(version.alias) if version else None
        if version and route and route.canary and version in route.versions:
            metrics.canary_requests.labels(version.alias, version.name, outcome).inc()

    def _alias(self) -> str:
        unnamed = self._serving.base_name if self.turn.names_nothing else NO_ALIAS
        return self._serving.metrics.label(self.turn.served or unnamed)


def _advice(told: Told, given: set[bytes]) -> list[tuple[bytes, bytes]]:
    """Headers that tell a client what to do about an error, unless it was told."""
    advice = []
    if told.status == 401:
        advice.append((b"www-authenticate", b"Bearer"))
    wait_s = told.retry_after_s
    if wait_s is None and told.status in (429, 503):
        wait_s = RETRY_AFTER_S
    if wait_s is not None:
        advice.append((b"retry-after", str(wait_s).encode()))
    return [pair for pair in advice if pair[0] not in given]


def _is_stream(start: Message) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream")
        for name, value in start.get("headers", ())
    )
