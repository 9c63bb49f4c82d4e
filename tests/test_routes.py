"""vLLM's own routes behind the real gate: who reaches which, by every method and kind of key."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match
from vllm.entrypoints.launchers.app import build_app

from serve import vllm_compat
from serve.access import Gate
from serve.endpoints import Endpoints
from serve.serving import Serving
from tests.fakes import APP, OPS

METRICS = {"authorization": "Bearer sk-prom-0123456789"}
WRONG = {"authorization": "Bearer sk-wrong-0123456789"}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
REACHED = 299  # the gate let it pass

# What a key of scope inference reaches on a server that generates. A route that vLLM adds is not
# among them until somebody has looked at it: does it honour aliases, and can it be bounded?
INFERENCE = {
    *(("POST", f"/v1/{name}") for name in (
        "chat/completions", "chat/completions/batch", "completions", "responses", "messages",
        "messages/count_tokens",
    )),
    ("POST", "/v1/responses/x/cancel"), ("POST", "/tokenize"), ("POST", "/detokenize"),
    ("GET", "/v1/models"), ("GET", "/v1/models/x"), ("HEAD", "/v1/models"),
    ("HEAD", "/v1/models/x"), ("GET", "/v1/responses/x"),
    ("GET", "/v1/responses/render"),  # a response of that name
    ("GET", "/version"), ("GET", "/load"), ("GET", "/ping"), ("POST", "/ping"),
}  # fmt: skip
PROBES = {(method, path) for method in ("GET", "HEAD") for path in ("/livez", "/readyz", "/health")}
# Shut for an admin, too.
SHUT = {
    "/invocations", "/v1/systemone", "/generative_scoring", "/scale_elastic_ep",
    "/is_scaling_elastic_ep", "/inference/v1/generate", "/inference/v1/abort_requests",
    "/v1/chat/completions/render", "/v1/completions/render", "/v1/messages/render",
    "/v1/responses/render",
    "/v1/chat/completions/derender", "/v1/completions/derender",
}  # fmt: skip
POOLING = SimpleNamespace(
    get_pooling_task=lambda _: "embed", hf_config=SimpleNamespace(num_labels=1),
    is_cross_encoder=False, is_late_interaction=False, is_multimodal_model=False,
    score_type="bi-encoder",
)  # fmt: skip
Scope = MutableMapping[str, Any]


def vllms(*tasks: Any, config: Any = POOLING) -> FastAPI:
    args = vllm_compat.parse(["--model", "m", "--disable-fastapi-docs", "--enable-lora"])
    app: FastAPI = build_app(args, tasks, config)
    Endpoints().attach_router(app)  # what vLLM does where VLLM_PLUGINS names us
    return app


@pytest.fixture(scope="module")
def generating() -> FastAPI:
    return vllms("generate")


@pytest.fixture
def gate(serving: Serving, generating: FastAPI) -> Iterator[FastAPI]:
    """vLLM's app, its routes real and nothing behind them: what passes is only counted."""
    assert serving.settings.api_key_file is not None
    with serving.settings.api_key_file.open("a") as file:
        file.write("prometheus:metrics:sk-prom-0123456789\n")
    serving.keys.reload()
    generating.state.quantserve = serving
    yield generating
    generating.root_path = ""


async def answered(app: FastAPI, method: str, path: str, headers: dict[str, str]) -> int:
    """The status that `Gate` gives, or REACHED; a WebSocket that is refused is a 403."""
    sent: list[Scope] = []

    async def reached(scope: Scope, receive: Any, send: Any) -> None:
        assert await receive() == {"type": "http.request", "body": b"", "more_body": False}
        await send({"type": "http.response.start", "status": REACHED, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> Scope:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Scope) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": raw, "app": app}
    if method == "WEBSOCKET":
        scope = {"type": "websocket", "path": path, "headers": raw, "app": app}
    await Gate(reached)(scope, receive, send)
    return int(sent[0].get("status", 403))


def walk(app: FastAPI) -> dict[tuple[str, str], bool]:
    """Every method on every route, and below the mounted one: whether the app would do something.

    Elsewhere it says itself that there is no such method.
    """
    paths = {filled(str(vars(route)["path"])) for route in app.routes} | {"/metrics/anything"}
    found = {}
    for method, path in product(METHODS, paths):
        scope = {"type": "http", "method": method, "path": path}
        found[method, path] = any(r.matches(scope)[0] is Match.FULL for r in app.routes)
    return found


def filled(template: str) -> str:
    head, opened, rest = template.partition("{")
    return head + "x" + rest.partition("}")[2] if opened else template


async def test_the_live_routes_are_open_to_whom_they_should_and_to_nobody_else(
    gate: FastAPI,
) -> None:
    does = walk(gate)
    assert {path for _, path in does} > SHUT and len(does) > 40 * len(METHODS)
    metrics = {("GET", "/metrics"), ("HEAD", "/metrics"), ("GET", "/metrics/anything"),
               ("HEAD", "/metrics/anything")}  # fmt: skip
    for who, headers, open_to in (
        ("no key", {}, PROBES),
        ("a wrong key", WRONG, PROBES),
        ("metrics", METRICS, PROBES | metrics),
        ("inference", APP, PROBES | INFERENCE),
    ):
        seen = {key: await answered(gate, *key, headers) for key in does}
        passed = {key for key, status in seen.items() if status == REACHED}
        assert {key for key in passed if does[key]} == open_to, who
        assert {path for _, path in passed} == {path for _, path in open_to}, who
        refused = {status for status in seen.values() if status != REACHED}
        assert refused <= ({401} if "key" in who else {403, 404}), who


async def test_an_admins_key_reaches_all_that_is_listed_and_nothing_that_is_not(
    gate: FastAPI,
) -> None:
    does = walk(gate)
    seen = {key: await answered(gate, *key, OPS) for key in does}
    assert {seen["POST", path] for path in SHUT} == {404}
    assert set(seen.values()) == {REACHED, 404}
    assert seen["PUT", "/admin/adapters/x"] == seen["POST", "/v1/load_lora_adapter"] == REACHED


async def test_a_route_of_another_release_stays_shut(gate: FastAPI) -> None:
    app = FastAPI()
    app.state.quantserve = gate.state.quantserve
    app.add_api_route("/v1/decisions", lambda: None, methods=["POST"])
    app.add_api_route("/v1/models", lambda: None, methods=["GET", "DELETE"])
    assert await answered(app, "POST", "/v1/decisions", OPS) == 404
    assert await answered(app, "DELETE", "/v1/models", OPS) == 404
    assert await answered(app, "GET", "/v1/models", APP) == REACHED


async def test_pooling_and_audio_have_their_routes_and_realtime_only_where_there_is_audio(
    gate: FastAPI,
) -> None:
    assert await answered(gate, "WEBSOCKET", "/v1/realtime", OPS) == 403
    app = vllms("embed", "score", "transcription", "realtime")
    app.state.quantserve = gate.state.quantserve
    for path in ("/v1/embeddings", "/v1/score", "/rerank", "/v1/audio/transcriptions"):
        assert await answered(app, "POST", path, APP) == REACHED
        assert await answered(app, "POST", path, METRICS) == 403
    assert await answered(app, "POST", "/invocations", OPS) == 404
    for headers, passes in ((APP, True), (METRICS, False), ({}, False)):
        told = await answered(app, "WEBSOCKET", "/v1/realtime", headers)
        assert (told == REACHED) == passes
    gate.state.quantserve.draining = True
    assert await answered(app, "WEBSOCKET", "/v1/realtime", APP) == 403


async def test_draining_refuses_all_that_works_and_answers_the_rest(gate: FastAPI) -> None:
    gate.state.quantserve.draining = True
    for (method, path), does in walk(gate).items():
        if does and (method, path) in INFERENCE:
            told = await answered(gate, method, path, APP)
            assert told == (503 if method == "POST" else REACHED), path


@pytest.mark.parametrize(
    ("root", "prefixes"),  # a proxy takes the prefix away, or does not
    [("/llm", ("", "/llm")), ("/inference/llm", ("", "/inference/llm")), ("/v1", ("/v1",)),
     ("/metrics", ("/metrics",)), ("/livez", ("/livez",))],
)  # fmt: skip
async def test_what_is_judged_is_what_is_routed(
    gate: FastAPI, root: str, prefixes: tuple[str, ...]
) -> None:
    gate.root_path = root
    for path in prefixes:
        assert await answered(gate, "GET", f"{path}/livez", {}) == REACHED
        assert await answered(gate, "GET", f"{path}/v1/models", APP) == REACHED
        assert await answered(gate, "GET", f"{path}/v1/models", {}) == 401
        assert await answered(gate, "GET", f"{path}/admin/adapters", APP) == 403
        assert await answered(gate, "PUT", f"{path}/admin/adapters/x", APP) == 403
        assert await answered(gate, "GET", f"{path}/metrics", APP) == 403


@pytest.mark.parametrize("path", ["/metrics", "/metrics/x", "/admin/adapters", "/v1/models", "/no"])
async def test_a_preflight_passes_only_where_cors_answers_it(gate: FastAPI, path: str) -> None:
    asks = {"access-control-request-method": "GET"}
    assert await answered(gate, "OPTIONS", path, asks) == 401
    assert await answered(gate, "OPTIONS", path, {"origin": "http://evil"}) == 401
    assert await answered(gate, "GET", path, {"origin": "http://evil", **asks}) == 401
    preflight = {"origin": "http://evil", **asks}
    assert await answered(gate, "OPTIONS", path, preflight) == REACHED
    assert CORSMiddleware in [vars(found)["cls"] for found in gate.user_middleware]
    bare = FastAPI()
    bare.state.quantserve = gate.state.quantserve
    assert await answered(bare, "OPTIONS", path, preflight) == 401


async def test_anthropics_header_brings_the_key_on_its_routes_alone(gate: FastAPI) -> None:
    key = {"x-api-key": "sk-app-0123456789"}
    assert await answered(gate, "POST", "/v1/messages", key) == REACHED
    assert await answered(gate, "POST", "/v1/messages/count_tokens", key) == REACHED
    assert await answered(gate, "POST", "/v1/messages", {"x-api-key": "sk-wrong-0123456789"}) == 401
    for path in ("/v1/chat/completions", "/v1/models", "/admin/drain", "/v1/messages/render"):
        assert await answered(gate, "POST", path, key) == 401
    assert await answered(gate, "POST", "/v1/messages", {"x-api-key": "sk-prom-0123456789"}) == 403
