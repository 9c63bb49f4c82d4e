"""Which route of the app a request is for, and what its caller needs: shut unless listed here.

Judged is what Starlette routes: the path behind the root path, the template it matches, the method.
A release of vLLM may bring routes of its own; they stay shut until somebody has looked at them and
put them here. All that generates honours adapters' aliases.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute, Match

OPEN = "open"  # to whoever reaches the port
WEBSOCKET = "WEBSOCKET"
READING = frozenset({"GET", "HEAD"})
PROBES = frozenset({"/livez", "/readyz", "/health"})
METRICS = "/metrics"  # a mounted app: all that is under it, too
RESPONSES = "/v1/responses"
ANTHROPIC = frozenset({"/v1/messages", "/v1/messages/count_tokens"})

# scope -> template -> methods; HEAD goes with GET
TABLE: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    OPEN: dict.fromkeys(PROBES, ("GET",)),
    "metrics": {METRICS: ("GET",)},
    "inference": {
        **dict.fromkeys(
            (
                "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/completions",
                RESPONSES, "/v1/responses/{response_id}/cancel", *ANTHROPIC,
                "/v1/embeddings", "/v2/embed", "/pooling", "/classify",
                "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank",
                "/v1/audio/transcriptions", "/v1/audio/translations",
                "/tokenize", "/detokenize",
            ),
            ("POST",),
        ),
        **dict.fromkeys(
            ("/v1/models", "/v1/models/{model:path}", "/v1/responses/{response_id}",
             "/version", "/load"),
            ("GET",),
        ),
        "/ping": ("GET", "POST"),
        "/v1/realtime": (WEBSOCKET,),
    },
    "admin": {
        "/admin/adapters": ("GET",),
        "/admin/adapters/{alias:path}": ("GET", "PUT", "DELETE"),
        "/admin/adapters/{alias:path}/history": ("GET",),
        "/admin/adapters/{alias:path}/canary": ("PUT", "DELETE"),
        "/admin/adapters/{alias:path}/promote": ("POST",),
        "/admin/adapters/{alias:path}/rollback": ("POST",),
        "/admin/drain": ("POST",),
        "/admin/engine": ("GET",),
        "/v1/load_lora_adapter": ("POST",),
        "/v1/unload_lora_adapter": ("POST",),
        "/start_profile": ("POST",),
        "/stop_profile": ("POST",),
        "/tokenizer_info": ("GET",),
        "/kv_event_sources": ("GET",),
    },
}  # fmt: skip
INSTEAD = {  # what to use where a route is shut for a reason
    "/invocations": "it would answer every model name with the base; use /v1/chat/completions",
}


@dataclass(frozen=True, slots=True)
class Target:
    """What a request is for. `scope` is empty where that is shut."""

    template: str
    scope: str
    works: bool = False  # gives the engine something to do

    @property
    def takes_api_key(self) -> bool:
        """Whether Anthropic's header may bring the key."""
        return self.template in ANTHROPIC


def target(app: Any, scope: Mapping[str, Any]) -> Target:
    """What the routes of `app` would do with an ASGI `scope` of it."""
    root = getattr(app, "root_path", "") or scope.get("root_path", "")
    seen = {**scope, "root_path": root}
    match, template = _first(app.routes, seen)
    method = scope.get("method", WEBSOCKET)
    for needed, listed in TABLE.items():
        if template in listed:
            methods = {*listed[template], *(("HEAD",) if "GET" in listed[template] else ())}
            allowed = method in methods
            if not allowed and match is Match.FULL:
                break  # it would be done, and nobody has allowed it
            works = allowed and needed == "inference" and method not in READING
            return Target(template, needed, works)  # the app says itself what is not allowed
    return Target(template, "")


def _first(routes: Iterable[BaseRoute], scope: Mapping[str, Any]) -> tuple[Match, str]:
    """Starlette's choice: the first full match, else the first by path alone."""
    partial = ""
    for route in routes:
        match, _ = route.matches(scope)  # type: ignore[arg-type]
        if match is Match.FULL:
            return match, str(getattr(route, "path", ""))
        if match is Match.PARTIAL:
            partial = partial or str(getattr(route, "path", ""))
    return (Match.PARTIAL, partial) if partial else (Match.NONE, "")


def is_preflight(app: Any, scope: Mapping[str, Any]) -> bool:
    """Whether the app's CORS middleware answers this itself: it does so before any route."""
    if scope.get("method") != "OPTIONS":
        return False
    names = {name for name, _ in scope.get("headers", ())}
    answers = any(found.cls is CORSMiddleware for found in app.user_middleware)
    return answers and {b"origin", b"access-control-request-method"} <= names
