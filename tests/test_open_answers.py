"""A worker about to end tells every client: a 503 before the first byte, an event in a stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from serve.access import Gate
from serve.serving import Serving
from tests.fakes import OPS


async def answering(request: Request) -> Response:
    """Streams a token, or nothing yet; then hangs as an engine does."""
    forever = asyncio.Event()
    if request.query_params["how"] == "plain":
        await forever.wait()

    async def tokens() -> AsyncIterator[str]:
        yield "data: token\n\n"
        await forever.wait()

    return StreamingResponse(tokens(), media_type="text/event-stream")


async def asked(serving: Serving, how: str) -> tuple[asyncio.Task[None], list[dict[str, object]]]:
    """A request to the real gate around `answering`, and what was sent of its answer by now."""
    app = Starlette(
        routes=[Route("/v1/completions", answering, methods=["POST"])],
        middleware=[Middleware(Gate)],
    )
    app.state.quantserve = serving
    headers = [(name.encode(), value.encode()) for name, value in OPS.items()]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions",
             "query_string": f"how={how}".encode(), "headers": headers, "app": app}  # fmt: skip
    sent: list[dict[str, object]] = []
    body = [{"type": "http.request", "body": b"{}"}]

    async def send(message: dict[str, object]) -> None:
        sent.append(dict(message))

    async def receive() -> dict[str, object]:
        if not body:
            await asyncio.Event().wait()
        return dict(body.pop())

    task = asyncio.create_task(app(scope, receive, send))  # type: ignore[arg-type]
    async with asyncio.timeout(60):
        while len(serving.answers) == 0 or (how == "stream" and len(sent) < 2):  # noqa: ASYNC110
            await asyncio.sleep(0)
    return task, sent


async def ended(serving: Serving, why: str, task: asyncio.Task[None]) -> None:
    serving.end(why)
    async with asyncio.timeout(60):
        while len(serving.answers):  # noqa: ASYNC110
            await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("why", ["server_draining", "engine_died", "engine_stalled"])
async def test_a_stream_gets_an_error_event_and_its_end(serving: Serving, why: str) -> None:
    task, sent = await asked(serving, "stream")
    await ended(serving, why, task)
    last, end = sent[-2:]
    assert not end["body"] and not end.get("more_body")
    assert isinstance(last["body"], bytes)
    event = json.loads(last["body"].removeprefix(b"data: "))
    assert event["error"]["code"] == why and event["error"]["message"]


async def test_who_has_had_nothing_yet_gets_a_503_to_try_again(serving: Serving) -> None:
    task, sent = await asked(serving, "plain")
    await ended(serving, "engine_died", task)
    start, body = sent
    assert start["status"] == 503 and (b"retry-after", b"5") in start["headers"]  # type: ignore[operator]
    assert json.loads(body["body"])["error"]["code"] == "engine_died"  # type: ignore[arg-type]


async def test_a_server_that_ends_admits_nobody(serving: Serving) -> None:
    assert serving.fault() is None
    serving.end("server_draining")
    fault = serving.fault()
    assert fault is not None and fault.status == 503 and fault.retry_after_s
    assert serving.metrics.lifetimes.page().decode().count("quantserve_ready 0.0") == 1


async def test_a_dead_engine_ends_every_answer_by_itself(serving: Serving) -> None:
    task, sent = await asked(serving, "plain")
    serving.engine_dead = lambda: True
    beat = serving.beat()
    assert beat.engine_dead and beat.open == 1
    await ended(serving, "engine_died", task)
    assert sent[0]["status"] == 503


async def test_an_engine_that_stands_still_serves_nobody_until_it_goes_on(serving: Serving) -> None:
    serving.stalled = True
    fault = serving.fault()
    assert fault is not None and fault.code == "engine_stalled"
    serving.stalled = False
    assert serving.fault() is None
