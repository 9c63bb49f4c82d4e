"""The way out: an adapter's request that finds no slot is a 503 before anything was streamed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from vllm.exceptions import GenerationError

from serve.access import Gate
from serve.endpoints import Published, _placing
from serve.serving import Serving
from tests.fakes import APP, BY, settled


@pytest.fixture
def app(serving: Serving) -> Starlette:
    """`/v1/chat` as vLLM has it: it generates, and words every fault itself."""
    made = Starlette(
        routes=[Route("/v1/chat", chat, methods=["POST"])], middleware=[Middleware(Gate)]
    )
    made.state.quantserve, made.state.published = serving, Published(serving.pool)
    made.state.resume = asyncio.Event()
    made.state.resume.set()

    async def stock(prompt: str, params: object, request_id: str) -> AsyncGenerator[str, None]:
        yield f"{prompt} {params} {request_id}"
        await made.state.resume.wait()
        yield "last"

    made.state.engine = SimpleNamespace(generate=_placing(stock, serving, None))
    return made


async def chat(request: Request) -> Response:
    state, body = request.app.state, await request.json()
    assert body["model"] == "base" or body["model"] in state.published
    answers = state.engine.generate("", None, f"r-{id(request)}")

    async def chunks() -> AsyncIterator[str]:
        try:
            async for answer in answers:
                yield f"data: {answer}\n\n"
        except GenerationError:
            yield 'data: {"error": "in vLLM\'s words"}\n\n'
        yield "data: [DONE]\n\n"

    if body.get("stream"):
        return StreamingResponse(chunks(), media_type="text/event-stream")
    whole = [chunk async for chunk in chunks()]
    return JSONResponse(whole, 500 if "error" in "".join(whole) else 200)


@pytest.fixture
async def client(app: Starlette) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=APP) as made:
        yield made


@asynccontextmanager
async def every_slot_held(serving: Serving) -> AsyncIterator[None]:
    async with AsyncExitStack() as held:
        for number in range(serving.pool.slots.count):
            await held.enter_async_context(serving.pool.slots.place(number))
        yield


@pytest.mark.parametrize("stream", [True, False])
async def test_no_slot_is_503_with_the_time_to_come_back_and_the_base_still_answers(
    client: httpx.AsyncClient, serving: Serving, folders: list[Path], *, stream: bool
) -> None:
    await serving.catalog.put("legal", str(folders[0]), BY)
    async with every_slot_held(serving):
        told = {"model": "legal", "stream": stream}
        answer = await client.post("/v1/chat", json=told)
        base = await client.post("/v1/chat", json={"model": "base", "stream": stream})
    fault = answer.json()["error"]
    assert (answer.status_code, fault["code"]) == (503, "adapter_slots_full")
    assert int(answer.headers["retry-after"]) > 0
    assert "in vLLM's words" not in answer.text and "--max-adapters" in fault["message"]
    assert base.status_code == 200
    assert serving.metrics.requests.labels("legal", "503")._value.get() == 1
    assert (await client.post("/v1/chat", json=told)).status_code == 200


async def test_a_stream_that_waited_for_its_slot_comes_whole(
    client: httpx.AsyncClient, serving: Serving, folders: list[Path]
) -> None:
    await serving.catalog.put("legal", str(folders[0]), BY)
    async with every_slot_held(serving):
        asked = asyncio.create_task(
            client.post("/v1/chat", json={"model": "legal", "stream": True})
        )
        await asyncio.sleep(0.03)
        assert not asked.done() and serving.pool.slots.waiting == 1
    answer = await asked
    assert answer.status_code == 200 and answer.text.endswith("data: [DONE]\n\n")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert serving.metrics.ttft.labels("legal")._sum.get() > 0.02
    await settled()
    route = serving.pool.get("legal")
    assert route is not None and route.stable.leases == 0
