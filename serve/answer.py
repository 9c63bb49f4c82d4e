"""The way out of one request: request id, version header, error shape, first token, counts.

Answers pass through untouched unless they are errors, which leave in OpenAI's shape. The status of
an adapter's stream is held back until its first token: it may still be refused, with a status that
says so.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from serve.errors import ServeError
from serve.metrics import NO_ALIAS
from serve.turn import Turn
from serve.wire import openai_error

if TYPE_CHECKING:
    from serve.serving import Serving

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


class Answer:
    """One request's answer on its way to the client; `counted` in the request metrics or not."""

    def __init__(self, serving: Serving, turn: Turn, path: str, send: Send) -> None:
        self._serving, self._turn, self._path, self._send = serving, turn, path, send
        self.request_id, self.counted = turn.id, False
        self._start: Message | None = None  # held back
        self._body = b""  # of an error
        self._streams = self._over = False

    async def send(self, message: Message) -> None:
        if self._over:
            return
        if message["type"] == "http.response.start":
            self._start = message
            self._streams = _is_stream(message)
        if self._turn.fault is not None and self._start is not None:
            await self.refuse(self._turn.fault)
        elif message["type"] == "http.response.start":
            if message["status"] < 400 and not (self._streams and self._turn.version):
                await self._begin(message)
        else:
            await self._send_body(message)

    async def refuse(self, fault: ServeError) -> None:
        """Answer with an error of ours, whatever was held back."""
        headers = []
        if fault.retry_after_s is not None:
            headers.append((b"retry-after", str(fault.retry_after_s).encode()))
        if fault.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await self._end(fault.status, headers, fault.body())

    async def _send_body(self, message: Message) -> None:
        if self._start is not None and self._start["status"] >= 400:
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                status, told = openai_error(self._start["status"], self._body, self._path)
                await self._end(status, self._start["headers"], told)
        else:
            if self._start is not None:
                await self._begin(self._start)
            self._note_first(message)
            await self._send(message)

    async def _begin(self, start: Message) -> None:
        self._start = None
        start["headers"] = self._dressed(start.get("headers", ()))
        self._count(start["status"])
        await self._send(start)

    async def _end(self, status: int, headers: Any, told: dict[str, Any]) -> None:
        """The whole of an error answer."""
        self._over = True
        body = json.dumps(told).encode()
        dropped = (b"content-length", b"content-type")
        kept = [pair for pair in self._dressed(headers) if pair[0].lower() not in dropped]
        kept.append((b"content-type", b"application/json"))
        kept.append((b"content-length", str(len(body)).encode()))
        if status == 503 and not any(name == b"retry-after" for name, _ in kept):
            kept.append((b"retry-after", b"2"))
        self._count(status)
        if self.counted:
            self._serving.metrics.errors.labels(self._alias(), told["error"]["code"]).inc()
        await self._send({"type": "http.response.start", "status": status, "headers": kept})
        await self._send({"type": "http.response.body", "body": body})

    def _dressed(self, headers: Any) -> list[tuple[bytes, bytes]]:
        kept = [pair for pair in headers if pair[0].lower() != b"x-request-id"]
        kept.append((b"x-request-id", self.request_id.encode("latin-1")))
        if self._turn.version is not None:
            kept.append((b"x-quantserve-adapter", self._turn.version.name.encode()))
        return kept

    def _note_first(self, message: Message) -> None:
        if self._streams and message.get("body"):
            self._streams = False
            waited = time.monotonic() - self._turn.began
            self._serving.metrics.ttft.labels(self._alias()).observe(waited)

    def _count(self, status: int) -> None:
        if not self.counted:
            return
        metrics, version = self._serving.metrics, self._turn.version
        metrics.requests.labels(self._alias(), str(status)).inc()
        route = self._serving.pool.get(version.alias) if version else None
        if version and route and route.canary and version in route.versions:
            metrics.canary_requests.labels(version.alias, version.name, str(status)).inc()

    def _alias(self) -> str:
        return self._turn.alias or NO_ALIAS


def _is_stream(start: Message) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream")
        for name, value in start.get("headers", ())
    )
