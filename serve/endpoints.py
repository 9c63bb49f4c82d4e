"""Our routes and our model names on vLLM's own app: a `vllm.endpoint_plugins` entry.

vLLM looks a requested model up in `openai_serving_models.lora_requests`. `Published` stands in for
that dictionary: a lookup leases the alias's current version for the request at hand, so that every
API of vLLM's resolves aliases, streams included, without a second parse of anything.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from vllm.lora.request import LoRARequest

from serve import health, keys, settings, stats
from serve.adapters import AdapterPool, Version
from serve.errors import AdapterRefused, BadRequest, ModelNotFound, NotFound, ServeError
from serve.metrics import Metrics
from serve.settings import Settings, check_alias
from serve.store import base_of
from serve.turn import current, ledger


class AdapterSource(BaseModel):
    """Body of PUT /admin/adapters/{alias}."""

    model_config = ConfigDict(extra="forbid")

    path: Path


class EngineLoadFailed(ServeError):
    """vLLM itself could not load what we found valid."""

    code = "adapter_load_failed"


class VllmEngine:
    """The pool's engine: vLLM's client, addressed by LoRARequest."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def load(self, version: Version) -> None:
        # vLLM hands on whatever its engine raised; a value is easier to judge than `except`.
        loading = asyncio.gather(self._client.add_lora(request_of(version)), return_exceptions=True)
        outcome: object = (await loading)[0]
        if isinstance(outcome, BaseException):
            await self.unload(version)
            raise EngineLoadFailed(f"vLLM could not load {version.name}: {outcome}") from outcome

    async def unload(self, version: Version) -> None:
        await self._client.remove_lora(version.slot)


def request_of(version: Version) -> LoRARequest:
    """How vLLM is told of a version."""
    return LoRARequest(version.name, version.slot, str(version.stored.folder))


class Published(dict[str, LoRARequest]):
    """alias -> LoRARequest of the version this request holds; empty to whoever iterates."""

    def __init__(self, pool: AdapterPool) -> None:
        super().__init__()
        self._pool = pool

    def __contains__(self, alias: object) -> bool:
        return isinstance(alias, str) and self._version(alias) is not None

    def __getitem__(self, alias: str) -> LoRARequest:
        version = self._version(alias)
        if version is None:
            raise KeyError(alias)
        return request_of(version)

    def _version(self, alias: str) -> Version | None:
        turn = current.get()
        if turn is None:
            return self._pool.get(alias)
        if turn.version is None:
            turn.version = self._pool.lease(alias)
            turn.alias = alias if turn.version else turn.alias
        return turn.version if turn.alias == alias else None


class Serving:
    """What every request needs: `app.state.quantserve`."""

    def __init__(self, chosen: Settings, engine_client: Any, args: Any) -> None:
        state_dir = chosen.state_dir or Path("/nonexistent")  # the supervisor always sets one
        self.settings, self.base_name = chosen, str(args.served_model_name[0])
        self._ready_fd: int | None = vars(args).get("quantserve_ready_fd")
        self.keys = keys.load(chosen.api_key_file)
        self.metrics: Metrics = stats.metrics
        base = base_of(chosen.artifact, chosen.max_lora_rank)
        self.pool = AdapterPool(
            VllmEngine(engine_client), base, state_dir, aliases=chosen.max_adapters
        )
        self.draining = False
        self.started = int(time.time())

    def announce(self) -> None:
        """Tell the supervisor, where there is one, that the app has started; drain on SIGUSR1."""
        if self._ready_fd is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self.drain)
            os.write(self._ready_fd, b"ready\n")

    def drain(self) -> None:
        """Admit nothing new from now on."""
        self.draining = True
        self.metrics.ready.set(0)


class Endpoints:
    """The plugin. vLLM calls `attach_router` when it builds the app, then `init_state`."""

    name = "quantserve"
    required_tasks = None  # every task has models, keys and health

    def attach_router(self, app: FastAPI) -> None:
        def serving() -> Serving:
            found: Serving = app.state.quantserve
            return found

        app.include_router(_admin_routes(app))
        app.include_router(_model_routes(app))

        def probe() -> Any:
            return app.state.engine_client.is_paused()

        app.include_router(health.routes(lambda: not serving().draining, probe))
        app.add_exception_handler(ServeError, _answer_error)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        chosen = settings.load()
        serving = Serving(chosen, engine_client, args)
        state.quantserve = serving
        _publish(state.openai_serving_models, serving)
        _note_requests(engine_client, serving.base_name)
        await serving.pool.restore(chosen.adapters)
        serving.metrics.adapters_loaded.set_function(serving.pool.__len__)
        serving.metrics.ready.set(1)


def _publish(models: Any, serving: Serving) -> None:
    """Let vLLM resolve aliases through the pool, and answer with the alias, not the version."""
    models.lora_requests = Published(serving.pool)

    def model_name(lora_request: LoRARequest | None = None) -> str:
        if lora_request is None:
            return serving.base_name
        return str(lora_request.lora_name).partition("@")[0]

    stock = models.is_base_model

    def is_base_model(name: str) -> bool:
        known = bool(stock(name))
        turn = current.get()
        if known and turn is not None:
            turn.alias = name
        return known

    models.model_name, models.is_base_model = model_name, is_base_model


def _note_requests(engine_client: Any, base_name: str) -> None:
    """Note which alias each engine request is for, whichever API it came through."""
    stock = engine_client.generate

    def generate(
        prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any
    ) -> AsyncIterator[Any]:
        turn = current.get()
        ledger.note(request_id, turn.alias or base_name if turn else base_name)
        answers: AsyncIterator[Any] = stock(prompt, sampling_params, request_id, *args, **kwargs)
        return answers

    engine_client.generate = generate


def _admin_routes(app: FastAPI) -> APIRouter:
    router = APIRouter(prefix="/admin")

    def serving() -> Serving:
        found: Serving = app.state.quantserve
        return found

    @router.get("/adapters")
    async def list_adapters() -> dict[str, Any]:
        return {"object": "list", "data": [v.facts() for v in serving().pool.live()]}

    @router.get("/adapters/{alias:path}")
    async def get_adapter(alias: str) -> dict[str, Any]:
        version = serving().pool.get(alias)
        if version is None:
            raise NotFound(f"no adapter {alias!r} is loaded", param="alias")
        return version.facts()

    @router.put("/adapters/{alias:path}")
    async def put_adapter(alias: str, source: AdapterSource) -> dict[str, Any]:
        return await _swap(serving(), alias, source.path)

    @router.delete("/adapters/{alias:path}")
    async def delete_adapter(alias: str) -> dict[str, Any]:
        await serving().pool.delete(alias)
        serving().metrics.forget(alias)
        return {"alias": alias, "deleted": True}

    @router.post("/drain")
    async def drain() -> dict[str, Any]:
        serving().drain()
        return {"status": "draining"}

    return router


async def _swap(serving: Serving, alias: str, path: Path) -> dict[str, Any]:
    if alias == serving.base_name:
        raise BadRequest(f"{alias!r} is the base model's name", param="alias")
    try:
        check_alias(alias)
    except ValueError as fault:
        raise BadRequest(str(fault), param="alias") from fault
    began = time.monotonic()
    try:
        version = await serving.pool.put(alias, path)
    except ServeError as fault:
        refused = isinstance(fault, AdapterRefused)
        serving.metrics.swaps.labels("refused" if refused else "failed").inc()
        raise
    serving.metrics.swaps.labels("ok").inc()
    serving.metrics.swap_seconds.observe(time.monotonic() - began)
    return version.facts()


def _model_routes(app: FastAPI) -> APIRouter:
    router = APIRouter()

    def cards() -> list[dict[str, Any]]:
        serving: Serving = app.state.quantserve
        length = app.state.openai_serving_models.model_config.max_model_len
        base = {"id": serving.base_name, "object": "model", "created": serving.started,
                "owned_by": "quantserve", "max_model_len": length}  # fmt: skip
        aliases = [
            base | {"id": v.alias, "created": int(v.loaded_at), "parent": serving.base_name}
            for v in serving.pool.live()
        ]
        return [base, *aliases]

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": cards()}

    @router.get("/v1/models/{model:path}")
    async def get_model(model: str) -> dict[str, Any]:
        for card in cards():
            if card["id"] == model:
                return card
        raise ModelNotFound(f"the model {model!r} does not exist", param="model")

    return router


async def _answer_error(_: Any, fault: Exception) -> JSONResponse:
    assert isinstance(fault, ServeError)
    retry = fault.retry_after_s
    headers = {"retry-after": str(retry)} if retry is not None else None
    return JSONResponse(fault.body(), fault.status, headers)
