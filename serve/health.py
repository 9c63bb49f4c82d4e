"""Is the process alive, and would a request be served: /livez and /readyz."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from fastapi import APIRouter
from fastapi.responses import JSONResponse

# A step of the engine answers nothing else while it runs; a long prefill on a CPU takes this long.
PROBE_TIMEOUT_S = 30.0


def routes(ready: Callable[[], bool], probe: Callable[[], Awaitable[object]]) -> APIRouter:
    """`ready` says whether requests are admitted; `probe` asks the engine anything at all."""
    router = APIRouter()

    @router.get("/livez")
    async def livez() -> JSONResponse:
        return JSONResponse({"status": "alive"})

    @router.get("/readyz")
    async def readyz() -> JSONResponse:
        if not ready():
            return JSONResponse({"status": "draining"}, 503)
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await probe()
        except TimeoutError:
            return JSONResponse({"status": "engine does not answer"}, 503)
        return JSONResponse({"status": "ready"})

    return router
