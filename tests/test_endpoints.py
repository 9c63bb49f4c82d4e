"""Model ids as vLLM looks them up: aliases, and versions by their own names."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI

from serve.adapters.pool import AdapterPool, Route
from serve.adapters.slots import Slots
from serve.adapters.sources import Sources
from serve.adapters.store import Store
from serve.endpoints import Published, _model_routes, answer_error
from serve.errors import ServeError
from serve.turn import Turn, current
from tests.fakes import BASE, MemoryEngine


@pytest.fixture
async def pool(tmp_path: Path, folders: list[Path]) -> AdapterPool:
    """An alias whose canary nobody gets, unless it is asked for by its name."""
    made = AdapterPool(MemoryEngine(), Slots(3, wait_s=0.1), ["base"])
    store = Store(tmp_path / "store", BASE, Sources())
    stable, canary = [
        await made.load("legal", store.take_in(str(folder))) for folder in folders[:2]
    ]
    await made.publish("legal", Route(stable, canary, 0.0))
    for version in (stable, canary):
        made.release(version)
    return made


async def test_a_request_gets_the_version_that_it_names_and_holds_it(pool: AdapterPool) -> None:
    route = pool.get("legal")
    assert route is not None and route.canary is not None
    keepers = [pool.hold(version) for version in route.versions]
    for model, version in (("legal", route.stable), (route.canary.name, route.canary),
                           (f"legal@{route.stable.digest}", route.stable)):  # fmt: skip
        turn = Turn()
        current.set(turn)
        published = Published(pool)
        for _ in range(2):  # vLLM asks several times
            assert model in published and published[model].lora_name == version.name
        assert (turn.alias, turn.version, version.leases) == ("legal", version, 2)
        with_canary = pool.get("legal")
        await pool.publish("legal", None)  # in the middle of the request
        assert model in published and published[model].lora_name == version.name
        await pool.publish("legal", with_canary)
        other = route.stable if version is route.canary else route.canary
        assert other.name not in published and other.leases == 1
        pool.release(version)
    for version in keepers:
        pool.release(version)
    current.set(None)
    assert Published(pool)[route.canary.name].lora_name == route.canary.name


async def test_a_version_that_is_not_published_is_no_model(pool: AdapterPool) -> None:
    turn = Turn()
    current.set(turn)
    for model in ("legal@0123456789ab", "legal@", "legal@latest", "other"):
        assert model not in Published(pool)
    assert turn.version is None and turn.alias == ""
    current.set(None)


@pytest.fixture
async def api(pool: AdapterPool) -> AsyncIterator[httpx.AsyncClient]:
    app = FastAPI()
    app.include_router(_model_routes(app))
    app.add_exception_handler(ServeError, answer_error)
    app.state.quantserve = SimpleNamespace(pool=pool, base_name="base", started=1)
    config = SimpleNamespace(max_model_len=64)
    app.state.openai_serving_models = SimpleNamespace(model_config=config)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as made:
        yield made


async def test_a_version_is_described_and_not_listed(
    api: httpx.AsyncClient, pool: AdapterPool
) -> None:
    listed = [card["id"] for card in (await api.get("/v1/models")).json()["data"]]
    assert listed == ["base", "legal"]
    route = pool.get("legal")
    assert route is not None and route.canary is not None
    for version in route.versions:
        card = (await api.get(f"/v1/models/{version.name}")).json()
        assert (card["id"], card["parent"]) == (version.name, "base")
    assert (await api.get("/v1/models/legal@0123456789ab")).status_code == 404
