"""/admin: what is served, and everything that changes it.

Every route needs the admin scope (serve.access). A change names the alias's revision in If-Match
to be sure of what it changes; answers carry it as ETag.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Header, Path, Query, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator

from serve import vllm_release
from serve.adapters.catalog import By
from serve.adapters.names import version_name
from serve.adapters.pool import Version
from serve.adapters.rows import Alias
from serve.errors import AdapterRefused, BadRequest, NotFound, RegistryDown, ServeError
from serve.serving import Serving
from serve.settings import LONGEST_ALIAS
from serve.turn import current

IfMatch = Annotated[str | None, Header()]
Name = Annotated[str, Path(pattern=r"^[A-Za-z0-9._/-]+$", max_length=LONGEST_ALIAS)]
ADAPTER = "/adapters/{alias:path}"
LONGEST_REVISION = 18  # digits


# An address or a version's name; refusals repeat it, and the history keeps them.
Text = Annotated[str, Field(max_length=2048)]


class Canary(BaseModel):
    """Which version some users get, and how many of them."""

    model_config = ConfigDict(extra="forbid")

    source: Text = ""
    version: Text = ""
    weight: float = Field(ge=0, le=1)

    @model_validator(mode="after")
    def _one_origin(self) -> Canary:
        if self.source and self.version:
            raise ValueError("give a source or a version, not both")
        return self


class Share(BaseModel):
    model_config = ConfigDict(extra="forbid")

    weight: float = Field(ge=0, le=1)


class Wish(BaseModel):
    """Body of PUT /admin/adapters/{alias}; `path` is `source` by its older name."""

    model_config = ConfigDict(extra="forbid")

    source: Text = ""
    path: Text = ""
    pinned: bool | None = None
    canary: Share | None = None

    @model_validator(mode="after")
    def _something(self) -> Wish:
        if self.source and self.path:
            raise ValueError("give source or path, not both")
        if not (self.source or self.path) and (self.pinned is None or self.canary):
            raise ValueError("give the source of an adapter")
        return self


class Target(BaseModel):
    """Body of a rollback; empty: the version before."""

    model_config = ConfigDict(extra="forbid")

    version: Text = ""


def routes(app: FastAPI) -> APIRouter:
    """The router; long paths first, since an alias may hold slashes."""
    router = APIRouter(prefix="/admin")

    def serving() -> Serving:
        found: Serving = app.state.quantserve
        return found

    @router.get("/adapters")
    async def list_adapters() -> dict[str, Any]:
        rows = serving().reconciler.rows
        return {"object": "list", "data": [facts(serving(), rows[alias]) for alias in sorted(rows)]}

    @router.get(ADAPTER + "/history")
    async def history(
        alias: Name, limit: Annotated[int, Query(ge=1, le=1000)] = 50
    ) -> dict[str, Any]:
        rows = await serving().registry.history(alias, limit)
        if not rows:
            raise NotFound(f"there has never been an adapter {alias!r}", param="alias")
        return {"object": "list", "data": rows}

    @router.get(ADAPTER)
    async def get_adapter(alias: Name, response: Response) -> dict[str, Any]:
        row = serving().reconciler.rows.get(alias)
        if row is None:
            raise NotFound(f"there is no adapter {alias!r}", param="alias")
        response.headers["etag"] = f'"{row.revision}"'
        return {**facts(serving(), row), **await _from_registry(serving(), alias)}

    _engine_routes(router, serving)
    _canary_routes(router, serving)
    _version_routes(router, serving)
    return router


def _engine_routes(router: APIRouter, serving: Callable[[], Serving]) -> None:
    @router.get("/engine")
    async def engine() -> dict[str, Any]:
        version, on_cpu = vllm_release.installed_version()
        return {"vllm": version, "cpu": on_cpu, "layers": serving().layers}

    @router.post("/drain")
    async def drain() -> dict[str, Any]:
        serving().drain()
        return {"status": "draining"}


def _canary_routes(router: APIRouter, serving: Callable[[], Serving]) -> None:
    @router.put(ADAPTER + "/canary")
    async def put_canary(
        alias: Name, body: Canary, response: Response, if_match: IfMatch = None
    ) -> dict[str, Any]:
        change = serving().catalog.canary(
            alias, by(if_match), body.weight, source=body.source, version=body.version
        )
        return await _changed(serving(), change, response)

    @router.delete(ADAPTER + "/canary")
    async def delete_canary(
        alias: Name, response: Response, if_match: IfMatch = None
    ) -> dict[str, Any]:
        change = serving().catalog.drop_canary(alias, by(if_match))
        return await _changed(serving(), change, response)

    @router.post(ADAPTER + "/promote")
    async def promote(alias: Name, response: Response, if_match: IfMatch = None) -> dict[str, Any]:
        change = serving().catalog.promote(alias, by(if_match))
        return await _changed(serving(), change, response)


def _version_routes(router: APIRouter, serving: Callable[[], Serving]) -> None:
    @router.post(ADAPTER + "/rollback")
    async def roll_back(
        alias: Name, response: Response, body: Target | None = None, if_match: IfMatch = None
    ) -> dict[str, Any]:
        version = body.version if body else ""
        change = serving().catalog.roll_back(alias, by(if_match), version)
        return await _changed(serving(), change, response)

    @router.put(ADAPTER)
    async def put_adapter(
        alias: Name, body: Wish, response: Response, if_match: IfMatch = None
    ) -> dict[str, Any]:
        change = _put(serving(), alias, body, by(if_match))
        return await _changed(serving(), change, response)

    @router.delete(ADAPTER)
    async def delete_adapter(alias: Name, if_match: IfMatch = None) -> dict[str, Any]:
        await serving().catalog.delete(alias, by(if_match))
        return {"alias": alias, "deleted": True}


async def _changed(
    serving: Serving, change: Awaitable[Alias], response: Response
) -> dict[str, Any]:
    row = await counted(serving, change)
    response.headers["etag"] = f'"{row.revision}"'
    return facts(serving, row)


async def _put(serving: Serving, alias: str, wish: Wish, who: By) -> Alias:
    source = wish.source or wish.path
    if wish.canary is not None:
        return await serving.catalog.canary(alias, who, wish.canary.weight, source=source)
    if not source:
        return await serving.catalog.pin(alias, who, pinned=bool(wish.pinned))
    return await serving.catalog.put(alias, source, who, pinned=wish.pinned)


async def counted(serving: Serving, change: Awaitable[Alias]) -> Alias:
    """A change of versions, in the metrics."""
    began = time.monotonic()
    try:
        row = await change
    except ServeError as fault:
        refused = isinstance(fault, AdapterRefused)
        serving.metrics.swaps.labels("refused" if refused else "failed").inc()
        raise
    serving.metrics.swaps.labels("ok").inc()
    serving.metrics.swap_seconds.observe(time.monotonic() - began)
    return row


def by(if_match: str | None = None) -> By:
    """Who asks: the name of the key, and the revision in If-Match."""
    turn = current.get()
    who = (turn.caller if turn else "") or "anyone"
    if if_match is None or if_match.strip() == "*":
        return By(who)
    revision = if_match.strip().removeprefix("W/").strip('"')
    if not revision.isdecimal() or len(revision) > LONGEST_REVISION:
        raise BadRequest(f"If-Match: {if_match[:40]} is not an ETag of ours", param="if-match")
    return By(who, int(revision))


def facts(serving: Serving, row: Alias) -> dict[str, Any]:
    """An alias as it is served here, and as the registry wants it."""
    route = serving.pool.get(row.alias)
    stable = route.stable if route else None
    canary = route.canary if route else None
    told = {
        "alias": row.alias,
        **_version(serving, row.alias, row.stable, stable),
        "pinned": row.pinned,
        "previous": version_name(row.alias, row.previous) if row.previous else None,
        "canary": None,
        "revision": row.revision,
    }
    if row.canary:
        told["canary"] = {
            "weight": row.weight,
            **_version(serving, row.alias, row.canary, canary),
        }
    return told


def _version(serving: Serving, alias: str, wanted: str, live: Version | None) -> dict[str, Any]:
    failure = serving.reconciler.failures.get((alias, wanted))
    there = live is not None and live.digest == wanted
    return {
        "version": live.name if live else version_name(alias, wanted),
        "wanted": version_name(alias, wanted),
        "digest": live.digest if live else wanted,
        "rank": live.stored.rank if live else None,
        "virtual_tokens": live.stored.virtual_tokens if live else None,
        "travels": live.stored.voice.told() if live else None,
        "loaded_at": int(live.loaded_at) if live else None,
        "requests": live.leases if live else 0,
        "state": "serving" if there else "failed" if failure else "loading",
        "reason": failure.reason if failure and not there else None,
    }


async def _from_registry(serving: Serving, alias: str) -> dict[str, Any]:
    """What is not known here: other versions, other replicas. Nothing while it is silent."""
    try:
        records = await serving.registry.records(alias)
        states = await serving.registry.states(alias)
    except RegistryDown:
        return {"versions": None, "replicas": None}
    versions = [
        {
            "version": version_name(alias, r.digest), "digest": r.digest, "source": r.source,
            "rank": r.rank, "bytes": r.bytes, "made_at": int(r.made_at), "made_by": r.made_by,
        }
        for r in records
    ]  # fmt: skip
    replicas = [
        {
            "replica": s["replica"], "version": version_name(alias, s["digest"]),
            "state": s["state"], "reason": s["reason"], "at": int(s["at"]),
        }
        for s in states
    ]  # fmt: skip
    return {"versions": versions, "replicas": replicas}
