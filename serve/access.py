"""The gate every request passes: who is it, may they, are we open; then its turn, and the books.

Pure ASGI and outermost, so that what it refuses costs nothing and what vLLM answers is counted.
Denies by default: a path that is not listed needs the admin scope. Bodies are not read, answers
pass through untouched unless they are errors, which leave in OpenAI's shape.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from starlette.routing import Match

from serve.errors import Draining, Forbidden, ServeError
from serve.metrics import NO_ALIAS
from serve.turn import Turn, current
from serve.wire import openai_error

if TYPE_CHECKING:
    from serve.endpoints import Serving

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]

OPEN = ("/livez", "/readyz", "/health")
INFERENCE = ("/v1/", "/v2/", "/tokenize", "/detokenize", "/generative_scoring", "/invocations",
             "/inference/", "/classify", "/pooling", "/score", "/rerank", "/version", "/load",
             "/ping")  # fmt: skip


class Gate:
    """ASGI middleware; finds the server's state on the app it is mounted in."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, _announcing(scope, send))
            return
        serving: Serving = scope["app"].state.quantserve
        scope["path"] = _tidy(scope["path"])
        turn = Turn()
        exit_ = _Exit(serving, turn, scope, send)
        try:
            _admit(serving, scope)
        except ServeError as fault:
            await (_refuse_socket(send) if scope["type"] == "websocket" else exit_.refuse(fault))
            return
        if scope["type"] == "websocket" or scope["path"] in (*OPEN, "/metrics"):
            await self._app(scope, receive, send)
            return
        token = current.set(turn)
        _set_header(scope, b"x-request-id", turn.id)
        serving.metrics.in_flight.inc()
        try:
            await self._app(scope, receive, exit_.send)
        finally:
            serving.metrics.in_flight.dec()
            current.reset(token)
            if turn.version is not None:
                serving.pool.release(turn.version)


def _announcing(scope: Message, send: Send) -> Send:
    """Tell the supervisor when the app has started; uvicorn accepts connections right after."""

    async def announcing(message: Message) -> None:
        await send(message)
        if message["type"] == "lifespan.startup.complete":
            scope["app"].state.quantserve.announce()

    return announcing


def _tidy(path: str) -> str:
    """Without doubled and trailing slashes, which front ends leave when they join addresses."""
    return "/" + "/".join(part for part in path.split("/") if part)


def _admit(serving: Serving, scope: Message) -> None:
    """InvalidKey, Forbidden or Draining; nothing when the request may go on."""
    path = scope["path"]
    if path in OPEN or _preflight(scope):
        return
    caller = serving.keys.caller(_header(scope, b"authorization"))
    needed = _scope_of(path)
    if needed == "admin" and not _routed(scope):
        return  # an unknown path: a known caller learns that it does not exist
    if not caller.may(needed):
        raise Forbidden(f"key {caller.name!r} lacks the scope {needed!r} that {path} needs")
    if serving.draining and needed == "inference" and scope.get("method") == "POST":
        raise Draining("this server is shutting down; send the request to another")


def _scope_of(path: str) -> str:
    if path == "/metrics":
        return "metrics"
    return "inference" if path.startswith(INFERENCE) else "admin"


def _routed(scope: Message) -> bool:
    return any(route.matches(scope)[0] != Match.NONE for route in scope["app"].routes)


def _preflight(scope: Message) -> bool:
    asked = _header(scope, b"access-control-request-method")
    return scope.get("method") == "OPTIONS" and asked is not None


class _Exit:
    """The way out of one request: request id, version header, error shape, first token, counts."""

    def __init__(self, serving: Serving, turn: Turn, scope: Message, send: Send) -> None:
        self._serving, self._turn, self._send = serving, turn, send
        self._path = scope["path"]
        self._request_id = _header(scope, b"x-request-id") or turn.id
        self._counted = scope.get("method") == "POST" and _scope_of(self._path) == "inference"
        self._held: Message | None = None  # the start of an error answer, until its body is whole
        self._body = b""
        self._streams = False

    async def refuse(self, fault: ServeError) -> None:
        headers = [(b"content-type", b"application/json")]
        if fault.retry_after_s is not None:
            headers.append((b"retry-after", str(fault.retry_after_s).encode()))
        if fault.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        start = {"type": "http.response.start", "status": fault.status, "headers": headers}
        await self.send(start)
        await self.send({"type": "http.response.body", "body": json.dumps(fault.body()).encode()})

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif self._held is not None:
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                await self._finish_error(self._held)
        else:
            if self._streams and message.get("body"):
                self._streams = False
                waited = time.monotonic() - self._turn.began
                self._serving.metrics.ttft.labels(self._alias()).observe(waited)
            await self._send(message)

    async def _begin(self, message: Message) -> None:
        headers = list(message.get("headers", ()))
        headers = [pair for pair in headers if pair[0].lower() != b"x-request-id"]
        headers.append((b"x-request-id", self._request_id.encode("latin-1")))
        if self._turn.version is not None:
            headers.append((b"x-quantserve-adapter", self._turn.version.name.encode()))
        message["headers"] = headers
        if message["status"] >= 400:
            self._held = message
            return
        self._streams = any(
            name.lower() == b"content-type" and value.startswith(b"text/event-stream")
            for name, value in headers
        )
        self._count(message["status"])
        await self._send(message)

    async def _finish_error(self, start: Message) -> None:
        status, told = openai_error(start["status"], self._body, self._path)
        body = json.dumps(told).encode()
        start["status"] = status
        dropped = (b"content-length", b"content-type")
        start["headers"] = [pair for pair in start["headers"] if pair[0].lower() not in dropped]
        start["headers"] += [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        if status == 503 and not any(name == b"retry-after" for name, _ in start["headers"]):
            start["headers"].append((b"retry-after", b"2"))
        self._count(status)
        if self._counted:
            self._serving.metrics.errors.labels(self._alias(), told["error"]["code"]).inc()
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body})

    def _count(self, status: int) -> None:
        if self._counted:
            self._serving.metrics.requests.labels(self._alias(), str(status)).inc()

    def _alias(self) -> str:
        return self._turn.alias or NO_ALIAS


async def _refuse_socket(send: Send) -> None:
    """Closing before accepting answers a WebSocket handshake with 403."""
    await send({"type": "websocket.close", "code": 1008})


def _header(scope: Message, name: bytes) -> str | None:
    for key, value in scope.get("headers", ()):
        if key == name:
            text: str = value.decode("latin-1")
            return text
    return None


def _set_header(scope: Message, name: bytes, value: str) -> None:
    kept = [pair for pair in scope["headers"] if pair[0] != name]
    scope["headers"] = [*kept, (name, value.encode())]
