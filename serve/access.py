"""The gate every request passes: who is it, may they, are we open; then its turn, and the books.

Pure ASGI and outermost, so that what it refuses costs nothing and what vLLM answers is counted.
Denies by default: serve.routes lists what is open to whom. A body is read whole, and measured,
before anything parses it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette._utils import get_route_path

from serve import json_limits, routes
from serve.answer import Answer, Message, Receive, Send
from serve.errors import Forbidden, NotFound, ServeError
from serve.keys import ANYONE
from serve.routes import Target
from serve.turn import Turn, current, tidy_id
from serve.wire import OPENAI, told_of

if TYPE_CHECKING:
    from serve.serving import Serving

SESSION = (b"x-session-id", b"x-user-id")  # whom an answer is for, where several share a key


class Gate:
    """ASGI middleware; finds the server's state on the app it is mounted in.

    Outside of Starlette's own error handling: what nobody handles is answered and counted, too.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        self._ids: set[str] = set()  # of the requests being answered

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, _announcing(scope, send))
            return
        serving: Serving = scope["app"].state.quantserve
        scope["path"] = _tidy(scope["path"])
        target = routes.target(scope["app"], scope)
        with self._turn(serving, scope) as turn:
            answer = Answer(serving, turn, get_route_path(scope), send)
            answer.counted = target.works and scope["type"] == "http"
            answer.bare = target.scope == routes.OPEN
            try:
                _admit(serving, scope, target, turn)
                item = serving.item if target.template == routes.RESPONSES else None
                receive = await json_limits.measured(scope, receive, serving.json_limits, item)
            except ServeError as fault:
                refused = scope["type"] == "websocket"
                await (_refuse_socket(scope, send, fault) if refused else answer.end(fault))
                return
            if scope["type"] == "websocket":
                await self._app(scope, receive, send)
                return
            in_flight = serving.metrics.in_flight
            counting = in_flight.track_inprogress() if answer.counted else nullcontext()
            with counting, serving.answers.holding(answer):
                await answer.run(partial(self._app, scope), receive)

    @contextmanager
    def _turn(self, serving: Serving, scope: Message) -> Iterator[Turn]:
        """This request's turn, under an id that no other request has while it is answered."""
        asked = tidy_id(_header(scope, b"x-request-id"))
        turn = Turn(request_id=asked)
        if asked:
            turn.id = asked if asked not in self._ids else f"{asked}-{turn.id[:8]}"
        _set_header(scope, b"x-request-id", turn.id)
        self._ids.add(turn.id)
        token = current.set(turn)
        try:
            yield turn
        finally:
            current.reset(token)
            self._ids.discard(turn.id)
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


def _admit(serving: Serving, scope: Message, target: Target, turn: Turn) -> None:
    """InvalidKey, Forbidden, NotFound, Draining; what passes has a turn that knows whose it is."""
    if target.scope == routes.OPEN or routes.is_preflight(scope["app"], scope):
        return
    api_key = (_header(scope, b"x-api-key") or "") if target.takes_api_key else None
    caller = serving.keys.caller(_header(scope, b"authorization"), api_key)
    turn.caller = caller.name if caller is not ANYONE else ""
    turn.session = next((found for name in SESSION if (found := _header(scope, name))), "")
    path = scope["path"]
    if not target.scope:
        why = routes.INSTEAD.get(target.template, "")
        raise NotFound(f"there is no {path} here" + (f": {why}" if why else ""))
    if not caller.may(target.scope):
        raise Forbidden(f"key {caller.name!r} lacks the scope {target.scope!r} that {path} needs")
    if target.works:
        serving.check_open()


async def _refuse_socket(scope: Message, send: Send, fault: ServeError) -> None:
    """Answer a WebSocket handshake; closing before accepting would be a 403 without a word."""
    if "websocket.http.response" not in scope.get("extensions", ()):
        await send({"type": "websocket.close", "code": 1008})
        return
    body = json.dumps(OPENAI.body(told_of(fault), "")).encode()
    size = str(len(body)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", size)]
    start = {"type": "websocket.http.response.start", "status": fault.status, "headers": headers}
    await send(start)
    await send({"type": "websocket.http.response.body", "body": body})


def _header(scope: Message, name: bytes) -> str | None:
    for key, value in scope.get("headers", ()):
        if key == name:
            text: str = value.decode("latin-1")
            return text
    return None


def _set_header(scope: Message, name: bytes, value: str) -> None:
    kept = [pair for pair in scope["headers"] if pair[0] != name]
    scope["headers"] = [*kept, (name, value.encode())]
