"""Two of three questions: /livez, is it alive; /readyz and /health, would a request be served now.

The third, does the engine get on, is the parent's (serve.watch), which tells the worker. No probe
waits for the engine. vLLM's charts ask /health before they send traffic, so it means the same as
/readyz here. /version tells ours beside vLLM's, which alone vLLM would tell.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from serve import vllm_release
from serve.errors import ServeError

METHODS = ["GET", "HEAD"]


def routes(fault: Callable[[], ServeError | None]) -> APIRouter:
    """`fault` is why a request would not be served now."""
    router = APIRouter()

    @router.api_route("/livez", methods=METHODS)
    async def livez() -> JSONResponse:
        return JSONResponse({"status": "alive"})

    @router.api_route("/readyz", methods=METHODS)
    @router.api_route("/health", methods=METHODS)
    async def readyz() -> JSONResponse:
        found = fault()
        if found is None:
            return JSONResponse({"status": "ready"})
        return JSONResponse(found.body(), found.status, {"retry-after": str(found.retry_after_s)})

    @router.get("/version")
    async def versions() -> JSONResponse:
        vllm, _ = vllm_release.installed_version()
        return JSONResponse({"version": vllm, "quantserve_version": version("quantserve")})

    return router
