"""The gate around an app that resolves models the way vLLM does: by a dictionary lookup."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import save_file
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serve.access import Gate
from serve.adapters import AdapterPool
from serve.endpoints import Published, Serving
from serve.settings import Settings
from tests.fakes import MemoryEngine
from tests.lora import write_lora

MODULE = "model.layers.0.self_attn.q_proj"
KEYS = "app:inference:sk-app-0123456789\nops:admin:sk-ops-0123456789\n"
APP = {"authorization": "Bearer sk-app-0123456789"}
OPS = {"authorization": "Bearer sk-ops-0123456789"}


@pytest.fixture
def serving(tmp_path: Path) -> Serving:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    save_file({f"{MODULE}.weight": torch.zeros(8, 6)}, model / "model.safetensors")
    (tmp_path / "keys").write_text(KEYS)
    chosen = Settings(artifact=model, api_key_file=tmp_path / "keys", state_dir=tmp_path / "state")
    made = Serving(chosen, None, argparse.Namespace(served_model_name=["base"]))
    made.pool = AdapterPool(MemoryEngine(), made.pool._base, tmp_path / "state", aliases=2)
    return made


@pytest.fixture
def app(serving: Serving) -> Starlette:
    """`/v1/chat` looks its model up, streams two chunks and waits for `resume` between them."""
    published = Published(serving.pool)
    made = Starlette(
        routes=[
            Route("/v1/chat", chat, methods=["POST"]),
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

    return StreamingResponse(chunks(), media_type="text/event-stream")


@pytest.fixture
async def client(app: Starlette) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as made:
        yield made


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [write_lora(tmp_path / f"l{seed}", {MODULE: (8, 6)}, seed=seed) for seed in range(2)]


@pytest.mark.parametrize(
    ("path", "headers", "status", "code"),
    [
        ("/v1/models", {}, 401, "invalid_api_key"),
        ("/v1/models", {"authorization": "Bearer wrong"}, 401, "invalid_api_key"),
        ("/v1/models", APP, 200, None),
        ("/admin/adapters", APP, 403, "insufficient_scope"),
        ("/admin/adapters", OPS, 200, None),
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


async def test_a_client_finds_its_own_request_id_but_vllm_gets_ours(
    client: httpx.AsyncClient, serving: Serving, folders: list[Path]
) -> None:
    await serving.pool.put("legal", folders[0])
    headers = {**APP, "x-request-id": "mine"}
    answer = await client.post("/v1/chat", json={"model": "legal"}, headers=headers)
    assert answer.headers["x-request-id"] == "mine"
    assert "mine" not in answer.text


async def test_a_swap_between_two_lookups_does_not_split_a_request(
    client: httpx.AsyncClient, app: Starlette, serving: Serving, folders: list[Path]
) -> None:
    first = await serving.pool.put("legal", folders[0])
    app.state.resume.clear()
    asked = asyncio.create_task(client.post("/v1/chat", json={"model": "legal"}, headers=APP))
    while not first.leases:  # noqa: ASYNC110 - the pool has no event for it
        await asyncio.sleep(0.01)
    second = await serving.pool.put("legal", folders[1])
    app.state.resume.set()
    answer = await asked
    assert answer.text.startswith(f"data: {first.name}")
    assert answer.headers["x-quantserve-adapter"] == first.name
    after = await client.post("/v1/chat", json={"model": "legal"}, headers=APP)
    assert after.text.startswith(f"data: {second.name}")
    assert first.leases == second.leases == 0


async def test_an_unknown_model_is_404_in_openais_words_and_adds_no_series(
    client: httpx.AsyncClient, serving: Serving
) -> None:
    answer = await client.post("/v1/chat", json={"model": "ghost"}, headers=APP)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    labels = [s.labels for m in serving.metrics.requests.collect() for s in m.samples]
    assert "ghost" not in json.dumps(labels)


async def test_draining_refuses_new_work_with_a_retry_hint(
    client: httpx.AsyncClient, serving: Serving
) -> None:
    serving.drain()
    answer = await client.post("/v1/chat", json={"model": "base"}, headers=APP)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "server_draining")
    assert int(answer.headers["retry-after"]) > 0
    assert (await client.get("/v1/models", headers=APP)).status_code == 200


async def test_requests_and_first_tokens_are_booked_on_their_alias(
    client: httpx.AsyncClient, serving: Serving, folders: list[Path]
) -> None:
    await serving.pool.put("booked", folders[0])
    await client.post("/v1/chat", json={"model": "booked"}, headers=APP)
    assert serving.metrics.requests.labels("booked", "200")._value.get() == 1
    assert serving.metrics.ttft.labels("booked")._sum.get() > 0
    serving.metrics.forget("booked")
    labels = [s.labels for m in serving.metrics.requests.collect() for s in m.samples]
    assert "booked" not in json.dumps(labels)
