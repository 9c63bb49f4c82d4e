"""Alive and ready are two questions, with GET and with HEAD, and no probe waits for anything."""

from __future__ import annotations

from importlib.metadata import version

import httpx
import pytest
from fastapi import FastAPI

from serve import health
from serve.errors import Draining, EngineDied, EngineStalled, ServeError


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("fault", [None, Draining("d"), EngineDied("e"), EngineStalled("s")])
async def test_what_each_says(method: str, fault: ServeError | None) -> None:
    app = FastAPI()
    app.include_router(health.routes(lambda: fault))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test"
    ) as client:
        assert (await client.request(method, "/livez")).status_code == 200
        for path in ("/readyz", "/health"):
            reply = await client.request(method, path)
            assert reply.status_code == (503 if fault else 200)
            assert ("retry-after" in reply.headers) == (fault is not None)


async def test_the_version_is_ours_beside_vllms() -> None:
    app = FastAPI()
    app.include_router(health.routes(lambda: None))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test"
    ) as client:
        told = (await client.get("/version")).json()
    assert told["quantserve_version"] == version("quantserve")
    assert told["version"].startswith(("0.32", "0.33"))
