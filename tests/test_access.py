"""The gate around an app that resolves models the way vLLM does: by a dictionary lookup."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serve.access import Gate
from serve.adapters.pool import Version
from serve.endpoints import Published
from serve.serving import Serving
from tests.fakes import APP, BY, OPS


@pytest.fixture
def app(serving: Serving) -> Starlette:
    """Chat looks its model up, streams two chunks and waits for `resume` between them."""
    published = Published(serving.pool)
    made = Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/load_lora_adapter", lambda _: JSONResponse({}), methods=["POST"]),
            Route("/v1/unload_lora_adapter", lambda _: JSONResponse({}), methods=["POST"]),
            Route("/v1/models", lambda _: JSONResponse({"data": []})),
            Route("/admin/adapters", lambda _: JSONResponse({"data": []})),
            Route("/livez", lambda _: JSONResponse({})),
            Route("/metrics", lambda _: Response("# none")),
        ],
        middleware=[Middleware(Gate)],
    )
    made.state.quantserve, made.state.published = serving, published
    made.state.resume = asyncio.Event()
    made.state.resume.set()
    return made


async def chat(request: Request) -> Response:
    published = request.app.state.published
    model = (await request.json())["model"]
    if model not in published:
        error = {"message": f"no {model}", "param": "model", "type": "NotFoundError", "code": 404}
        return JSONResponse({"error": error}, 404)
    await request.app.state.resume.wait()
    version = published[model].lora_name  # vLLM asks a second time, maybe after a swap

    async def chunks() -> AsyncIterator[str]:
        yield f"data: {version}\n\n"
        await request.app.state.resume.wait()
        yield f"data: {request.headers['x-request-id']}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(chunks(), media_type="text/event-stream")


@pytest.fixture
async def client(app: Starlette) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as made:
        yield made


@pytest.mark.parametrize(
    ("path", "headers", "status", "code"),
    [
        ("/v1/models", {}, 401, "invalid_api_key"),
        ("/v1/models", {"authorization": "Bearer wrong"}, 401, "invalid_api_key"),
        ("/v1/models", APP, 200, None),
        ("/admin/adapters", APP, 403, "insufficient_scope"),
        ("/admin/adapters", OPS, 200, None),
        ("/v1/load_lora_adapter", APP, 403, "insufficient_scope"),
        ("/v1/unload_lora_adapter", APP, 403, "insufficient_scope"),
        ("/metrics", APP, 403, "insufficient_scope"),
        ("/metrics", OPS, 200, None),
        ("/livez", {}, 200, None),
        ("/nothing", {}, 401, "invalid_api_key"),
        ("/nothing", APP, 404, "not_found"),
    ],
)
async def test_every_path_is_closed_unless_its_scope_is_held(
    client: httpx.AsyncClient, path: str, headers: dict[str, str], status: int, code: str | None
) -> None:
    answer = await client.get(path, headers=headers)
    assert answer.status_code == status
    if code:
        assert answer.json()["error"]["code"] == code
        assert answer.headers["x-request-id"]


async def put(serving: Serving, alias: str, folder: Path) -> Version:
    await serving.catalog.put(alias, str(folder), BY)
    route = serving.pool.get(alias)
    assert route is not None
    return route.stable


async def test_a_clients_request_id_is_the_answers_and_vllms(
    client: httpx.AsyncClient, serving: Serving, folders: list[Path]
) -> None:
    await put(serving, "legal", folders[0])
    for given, kept in [("mine-1", "mine-1"), ("a b\x1b[1m", "ab1m"), ("x" * 5000, "x" * 128)]:
        headers = {**APP, "x-request-id": given}
        answer = await client.post("/v1/chat/completions", json={"model": "legal"}, headers=headers)
        assert answer.headers.get_list("x-request-id") == [kept]
        assert f"data: {kept}\n\n" in answer.text


async def test_two_requests_under_one_id_are_two_to_vllm(
    client: httpx.AsyncClient, app: Starlette, serving: Serving, folders: list[Path]
) -> None:
    await put(serving, "legal", folders[0])
    app.state.resume.clear()
    headers = {**APP, "x-request-id": "mine"}
    asked = [
        asyncio.create_task(
            client.post("/v1/chat/completions", json={"model": "legal"}, headers=headers)
        )
        for _ in range(2)
    ]
    while serving.metrics.in_flight._value.get() < 2:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    app.state.resume.set()
    answers = await asyncio.gather(*asked)
    assert [answer.headers["x-request-id"] for answer in answers] == ["mine", "mine"]
    ids = {answer.text.split("data: ")[-2].strip() for answer in answers}
    assert len(ids) == 2 and all(name.startswith("mine") for name in ids)


async def test_a_swap_between_two_lookups_does_not_split_a_request(
    client: httpx.AsyncClient, app: Starlette, serving: Serving, folders: list[Path]
) -> None:
    first = await put(serving, "legal", folders[0])
    app.state.resume.clear()
    asked = asyncio.create_task(
        client.post("/v1/chat/completions", json={"model": "legal"}, headers=APP)
    )
    while not first.leases:  # noqa: ASYNC110 - the pool has no event for it
        await asyncio.sleep(0.01)
    second = await put(serving, "legal", folders[1])
    app.state.resume.set()
    answer = await asked
    assert answer.text.startswith(f"data: {first.name}")
    assert answer.headers["x-quantserve-adapter"] == first.name
    after = await client.post("/v1/chat/completions", json={"model": "legal"}, headers=APP)
    assert after.text.startswith(f"data: {second.name}")
    assert first.leases == second.leases == 0


async def test_an_unknown_model_is_404_in_openais_words_and_adds_no_series(
    client: httpx.AsyncClient, serving: Serving
) -> None:
    answer = await client.post("/v1/chat/completions", json={"model": "ghost"}, headers=APP)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    labels = [s.labels for m in serving.metrics.requests.collect() for s in m.samples]
    assert "ghost" not in json.dumps(labels)


async def test_draining_refuses_new_work_with_a_retry_hint(
    client: httpx.AsyncClient, serving: Serving
) -> None:
    serving.drain()
    answer = await client.post("/v1/chat/completions", json={"model": "base"}, headers=APP)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "server_draining")
    assert int(answer.headers["retry-after"]) > 0
    assert (await client.get("/v1/models", headers=APP)).status_code == 200


async def test_requests_and_first_tokens_are_booked_on_their_alias(
    client: httpx.AsyncClient, serving: Serving, folders: list[Path]
) -> None:
    await put(serving, "booked", folders[0])
    await client.post("/v1/chat/completions", json={"model": "booked"}, headers=APP)
    assert serving.metrics.requests.labels("booked", "ok")._value.get() == 1
    assert serving.metrics.ttft.labels("booked")._sum.get() > 0
    await serving.catalog.delete("booked", BY)
    labels = [s.labels for m in serving.metrics.requests.collect() for s in m.samples]
    assert "booked" not in json.dumps(labels)
    assert serving.metrics.requests.labels("gone", "ok")._value.get() == 1


@pytest.mark.parametrize("header", ["x-session-id", "x-user-id"])
async def test_a_user_keeps_a_version_and_the_answer_names_it(
    client: httpx.AsyncClient, serving: Serving, folders: list[Path], header: str
) -> None:
    await put(serving, "legal", folders[0])
    await serving.catalog.canary("legal", BY, 0.5, source=str(folders[1]))
    given: dict[str, set[str]] = {}
    for turn in range(60):
        user = f"user{turn % 20}"
        headers = {**APP, header: user}
        answer = await client.post("/v1/chat/completions", json={"model": "legal"}, headers=headers)
        given.setdefault(user, set()).add(answer.headers["x-quantserve-adapter"])
    assert all(len(versions) == 1 for versions in given.values())
    assert len(set().union(*given.values())) == 2


async def test_without_a_session_the_key_is_the_user(
    client: httpx.AsyncClient, serving: Serving, folders: list[Path]
) -> None:
    await put(serving, "legal", folders[0])
    await serving.catalog.canary("legal", BY, 0.5, source=str(folders[1]))
    answers = [
        await client.post("/v1/chat/completions", json={"model": "legal"}, headers=APP)
        for _ in range(8)
    ]
    assert len({answer.headers["x-quantserve-adapter"] for answer in answers}) == 1


async def test_a_canarys_requests_are_counted_apart_until_it_ends(
    client: httpx.AsyncClient, serving: Serving, folders: list[Path]
) -> None:
    stable = await put(serving, "legal", folders[0])
    await client.post("/v1/chat/completions", json={"model": "legal"}, headers=APP)
    assert canary_series(serving) == {}
    await serving.catalog.canary("legal", BY, 1.0, source=str(folders[1]))
    await client.post("/v1/chat/completions", json={"model": "legal"}, headers=APP)
    (series,) = canary_series(serving).items()
    assert series[0] != stable.name and series[1] == 1.0
    await serving.catalog.drop_canary("legal", BY)
    assert canary_series(serving) == {}


def canary_series(serving: Serving) -> dict[str, float]:
    (family,) = serving.metrics.canary_requests.collect()
    return {s.labels["version"]: s.value for s in family.samples if s.name.endswith("_total")}


async def test_a_handshake_without_a_key_is_told_why(app: Starlette) -> None:
    """Where the server in front can: else it is a bare 403."""
    scope = {"type": "websocket", "path": "/v1/realtime", "headers": [], "app": app}
    told: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        told.append(message)

    gate = Gate(app)
    await gate({**scope, "extensions": {"websocket.http.response": {}}}, receive, send)
    assert told[0]["status"] == 401
    assert json.loads(told[1]["body"])["error"]["code"] in ("invalid_api_key", "not_found")
    await gate(scope, receive, send)
    assert told[2] == {"type": "websocket.close", "code": 1008}
