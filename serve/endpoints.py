"""Our routes and our model names on vLLM's own app: a `vllm.endpoint_plugins` entry.

vLLM looks a requested model up in `openai_serving_models.lora_requests`. `Published` stands in for
that dictionary: a lookup leases the alias's current version for the request at hand, so that every
API of vLLM's resolves aliases, streams included, without a second parse of anything.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.lora.request import LoRARequest

from serve import (
    admin,
    bodies,
    controllers,
    health,
    incoming,
    kernel_report,
    logs,
    request_limits,
    settings,
    stats,
    vllm_compat,
    voices,
)
from serve.access import Gate
from serve.adapters import names
from serve.adapters.pool import AdapterPool, Version
from serve.connections import Connections
from serve.errors import (
    AdapterRefused,
    BadRequest,
    Conflict,
    ServeError,
)
from serve.serving import Serving
from serve.soft_prompts import SoftPrompts
from serve.tryout import Tryout
from serve.turn import current
from serve.unknown_model import unknown_model
from serve.validation import explain


class EngineLoadFailed(ServeError):
    """vLLM itself could not load what we found valid."""

    code = "adapter_load_failed"


class EngineUnloadFailed(ServeError):
    """vLLM itself could not let go of what nobody needs any more."""

    code = "adapter_unload_failed"


class VllmEngine:
    """The pool's engine: vLLM's client, addressed by LoRARequest; `chats` writes its chats.

    Soft prompts stay in this process; `soft` is None where vLLM was not told to expect them.
    """

    def __init__(self, client: Any, soft: SoftPrompts | None, chats: Any) -> None:
        self._client, self.soft = client, soft
        self._tryout = Tryout(client, chats)
        self._templates = vllm_compat.takes_templates(client.renderer)

    async def load(self, version: Version) -> None:
        """Into the engine; AdapterRefused for what no request would get through with."""
        if version.stored.voice.templates and not self._templates:
            raise AdapterRefused(
                "the base's tokenizer writes chats without templates, so the adapter's chat "
                "template has no place; take it out of the folder, or merge the adapter",
                param="chat_template",
            )
        if version.soft and self.soft is None:
            raise Conflict(
                f"{version.alias!r} is prompt-tuned: start the server with --prompt-tuning"
            )
        await self._tryout.of(version)
        await self._give(version)

    async def _give(self, version: Version) -> None:
        if version.soft and self.soft is not None:
            await self.soft.load(version)
            return
        fault = await _fault_of(self._client.add_lora(request_of(version)))
        if fault is not None:
            await self.unload(version)
            raise EngineLoadFailed(f"vLLM could not load {version.name}: {fault}") from fault

    async def pin(self, version: Version) -> bool:
        """Whether vLLM did. It may have dropped the version from memory: it is given it again."""
        await self._give(version)
        return await _fault_of(self._client.pin_lora(version.slot)) is None

    async def unload(self, version: Version) -> None:
        if version.soft and self.soft is not None:
            self.soft.unload(version)
            return
        fault = await _fault_of(self._client.remove_lora(version.slot))
        if fault is not None and not self._client.errored:  # an engine that has ended holds nothing
            raise EngineUnloadFailed(f"vLLM kept it: {fault!r}") from fault


async def _fault_of(call: Any) -> BaseException | None:
    """vLLM hands on whatever its engine raised; a value is easier to judge than `except`."""
    outcome: object = (await asyncio.gather(call, return_exceptions=True))[0]
    return outcome if isinstance(outcome, BaseException) else None


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

    def _version(self, model: str) -> Version | None:
        turn = current.get()
        if turn is not None and turn.version is not None:  # published still or not
            alias, digest = names.asked(model)
            same = turn.alias == alias and turn.version.digest.startswith(digest)
            return turn.version if same else None
        alias, named = self._pool.asked(model)
        if turn is None:
            route = self._pool.get(alias)
            return named or (route.stable if route else None)
        version = self._pool.hold(named) if named else self._pool.lease(alias, turn.identity)
        if version is not None:
            turn.alias, turn.version = alias, version
        return version


class Endpoints:
    """The plugin. vLLM calls `attach_router` when it builds the app, then `init_state`."""

    name = "quantserve"
    required_tasks = None  # every task has models, keys and health

    def attach_router(self, app: FastAPI) -> None:
        def serving() -> Serving:
            found: Serving = app.state.quantserve
            return found

        app.include_router(admin.routes(app))
        app.include_router(controllers.routes(app))
        app.include_router(_model_routes(app))

        app.include_router(health.routes(lambda: serving().fault()))
        app.add_exception_handler(ServeError, answer_error)
        enclose(app)
        app.router.lifespan_context = _stopping(app.router.lifespan_context, serving)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        base_name, *others = map(str, args.served_model_name)
        engine = VllmEngine(engine_client, _soft_prompts(engine_client), state.online_renderer)
        serving = Serving(settings.load(), engine, stats.metrics, base_name, *others)
        serving.line_fd = vars(args).get("quantserve_line_fd")
        serving.engine_dead = lambda: bool(engine_client.errored)
        serving.ask_engine = engine_client.is_paused
        serving.connections = Connections(lambda: state.server)
        state.quantserve = serving
        _publish(state.openai_serving_models, serving)
        _give_voice(state, serving)
        stats.follow(engine_client.output_processor, base_name)
        serving.item = vllm_compat.response_item()
        trial = serving.trial = incoming.trial_of(engine_client, serving)
        vllm_compat.watch_requests(
            incoming.watching(request_limits.limits_of(serving.settings), trial)
        )
        incoming.judge(state, args, serving)
        vllm_compat.end_quietly(engine_client)
        for method in ("generate", "encode"):
            stock = getattr(engine_client, method)
            setattr(engine_client, method, incoming.placing(stock, serving, engine.soft))
        serving.layers = await vllm_compat.layers_by_kernel(engine_client)
        # past vLLM's own prefix of every line that this process writes
        os.write(sys.stderr.fileno(), f"kernels: {kernel_report.line(serving.layers)}\n".encode())
        await serving.start()


def _stopping(stock: Any, serving: Callable[[], Serving]) -> Any:
    """vLLM's lifespan of its app, with an end of ours: `init_state` began what is stopped here."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        async with stock(app) as state:
            logs.attach(is_clients)
            try:
                yield state
            finally:
                await serving().stop()

    return lifespan


def enclose(app: FastAPI) -> None:
    """Put the gate around all that answers, Starlette's own handling of exceptions included.

    By the time the stack is built, vLLM has registered its handlers: of what nobody handles, which
    the gate answers, and of bodies that are not valid, which it words by Python's repr.
    """
    stock = app.build_middleware_stack

    def build_middleware_stack() -> Any:
        app.exception_handlers.pop(Exception, None)
        app.exception_handlers[RequestValidationError] = answer_invalid
        bodies.name_fields(app.routes)
        return Gate(stock())

    app.build_middleware_stack = build_middleware_stack  # type: ignore[method-assign]
    app.middleware_stack = None  # one that was built already is built anew


def is_clients(fault: BaseException) -> bool:
    """Whether vLLM answers this exception with a status of the client's."""
    if isinstance(fault, ServeError):
        return fault.status < 500
    return isinstance(fault, Exception) and int(create_error_response(fault).error.code) < 500


def _soft_prompts(client: Any) -> SoftPrompts | None:
    config = client.model_config
    if not vllm_compat.close_to_clients(config):
        return None
    return SoftPrompts(config.dtype, config.max_model_len, client.renderer.validate_token_ids)


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
            turn.alias = serving.base_name
        return known

    models.model_name, models.is_base_model = model_name, is_base_model


def _give_voice(state: Any, serving: Serving) -> None:
    """Let versions answer with their own chat template and defaults."""
    shown = state.online_renderer
    if vllm_compat.takes_templates(shown.renderer):
        render = serving.templates.render
        vllm_compat.render_with(shown.renderer, shown.chat_template, render)
    for handler in vars(state)["_state"].values():
        if hasattr(handler, "default_sampling_params"):
            handler.default_sampling_params = voices.Defaults(handler.default_sampling_params)


def _model_routes(app: FastAPI) -> APIRouter:
    router = APIRouter()

    def cards() -> list[dict[str, Any]]:
        serving: Serving = app.state.quantserve
        length = app.state.openai_serving_models.model_config.max_model_len
        base = {"id": serving.base_name, "object": "model", "created": serving.started,
                "owned_by": "quantserve", "max_model_len": length}  # fmt: skip
        aliases = [
            base | {"id": alias, "created": int(route.stable.loaded_at), "parent": base["id"]}
            for alias, route in serving.pool.live().items()
        ]
        return [base, *aliases]

    @router.api_route("/v1/models", methods=["GET", "HEAD"])
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": cards()}

    @router.api_route("/v1/models/{model:path}", methods=["GET", "HEAD"])
    async def get_model(model: str) -> dict[str, Any]:
        serving: Serving = app.state.quantserve
        alias, version = serving.pool.asked(model)
        for card in cards():
            if card["id"] == alias:
                made = {"created": int(version.loaded_at)} if version else {}
                return card | {"id": model} | made
        raise unknown_model(model, [card["id"] for card in cards()])

    return router


async def answer_invalid(_: Any, fault: Exception) -> JSONResponse:
    """A body that does not fit its schema, as one sentence."""
    assert isinstance(fault, RequestValidationError)
    message, field = explain(fault.errors(), fault.body)
    return await answer_error(None, BadRequest(message, param=field))


async def answer_error(_: Any, fault: Exception) -> JSONResponse:
    assert isinstance(fault, ServeError)
    retry = fault.retry_after_s
    headers = {"retry-after": str(retry)} if retry is not None else None
    return JSONResponse(fault.body(), fault.status, headers)
