"""The admin routes over HTTP: what they take, what they tell, and who may."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from serve import admin, controllers
from serve.access import Gate
from serve.adapters.rows import Alias, Event
from serve.endpoints import answer_error
from serve.errors import ServeError
from serve.serving import Serving
from tests.fakes import MODULE, OPS
from tests.lora import write_lora

LEGAL = "/admin/adapters/legal"


@pytest.fixture
async def ops(serving: Serving) -> AsyncIterator[httpx.AsyncClient]:
    app = FastAPI()
    app.include_router(admin.routes(app))
    app.include_router(controllers.routes(app))
    app.add_exception_handler(ServeError, answer_error)
    app.add_middleware(Gate)
    app.state.quantserve = serving
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=OPS) as made:
        yield made


async def put(ops: httpx.AsyncClient, source: Path, path: str = LEGAL, **more: Any) -> Any:
    answer = await ops.put(path, json={"source": str(source), **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_a_put_is_told_in_full(ops: httpx.AsyncClient, folders: list[Path]) -> None:
    made = await put(ops, folders[0])
    assert made["version"] == f"legal@{made['digest'][:12]}"
    assert (made["state"], made["reason"], made["rank"]) == ("serving", None, 4)
    assert (await ops.get("/admin/adapters")).json()["data"] == [made]
    detail = (await ops.get(LEGAL)).json()
    assert detail | made == detail
    (version,) = detail["versions"]
    assert (version["version"], version["source"]) == (made["version"], str(folders[0]))
    assert version["made_by"] == "ops"


async def test_the_engine_tells_which_kernel_serves_how_many_layers(
    ops: httpx.AsyncClient, serving: Serving
) -> None:
    serving.layers = [{"W4A16 on avx2 (quantserve)": 120}]
    told = (await ops.get("/admin/engine")).json()
    assert told["layers"] == serving.layers
    assert told["vllm"].startswith("0.3") and isinstance(told["cpu"], bool)


async def test_the_older_word_path_is_understood(
    ops: httpx.AsyncClient, folders: list[Path]
) -> None:
    answer = await ops.put(LEGAL, json={"path": str(folders[0])})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({}, "source"),
        ({"source": "/a", "path": "/b"}, "not both"),
        ({"source": "/a", "weight": 1}, "weight"),
        ({"source": "/a", "canary": {"weight": 2}}, "weight"),
        ({"canary": {"weight": 0.1}}, "source"),
    ],
)
async def test_a_body_that_makes_no_sense_is_400(
    ops: httpx.AsyncClient, body: dict[str, Any], reason: str
) -> None:
    answer = await ops.put(LEGAL, json=body)
    assert answer.status_code == 400 and reason in answer.json()["error"]["message"]


@pytest.mark.parametrize("alias", ["a@b", "base", "x/history/canary", "a%20b"])
async def test_an_alias_that_cannot_be_is_400(
    ops: httpx.AsyncClient, folders: list[Path], alias: str
) -> None:
    answer = await ops.put(f"/admin/adapters/{alias}", json={"source": str(folders[0])})
    assert answer.status_code in (400, 404), answer.text


async def test_an_alias_with_slashes_has_every_route(
    ops: httpx.AsyncClient, folders: list[Path]
) -> None:
    path = "/admin/adapters/team/legal"
    await put(ops, folders[0], path)
    await put(ops, folders[1], path)
    assert (await ops.post(f"{path}/rollback")).json()["alias"] == "team/legal"
    rows = (await ops.get(f"{path}/history")).json()["data"]
    assert [row["action"] for row in rows] == ["rollback", "put", "put"]
    assert (await ops.delete(path)).json() == {"alias": "team/legal", "deleted": True}


async def test_the_life_of_a_canary(ops: httpx.AsyncClient, folders: list[Path]) -> None:
    stable = await put(ops, folders[0])
    made = await put(ops, folders[1], canary={"weight": 0.1})
    assert made["version"] == stable["version"]
    assert (made["canary"]["weight"], made["canary"]["state"]) == (0.1, "serving")
    grown = (await ops.put(f"{LEGAL}/canary", json={"weight": 0.5})).json()
    assert grown["canary"]["version"] == made["canary"]["version"]
    promoted = (await ops.post(f"{LEGAL}/promote")).json()
    assert (promoted["version"], promoted["canary"]) == (made["canary"]["version"], None)
    assert promoted["previous"] == stable["version"]
    assert (await ops.post(f"{LEGAL}/promote")).status_code == 409
    again = await ops.put(f"{LEGAL}/canary", json={"version": stable["version"], "weight": 0.3})
    assert again.json()["canary"]["version"] == stable["version"]
    assert (await ops.delete(f"{LEGAL}/canary")).json()["canary"] is None


async def test_a_rollback_to_a_named_version(ops: httpx.AsyncClient, folders: list[Path]) -> None:
    first = await put(ops, folders[0])
    for folder in folders[1:3]:
        await put(ops, folder)
    answer = await ops.post(f"{LEGAL}/rollback", json={"version": first["version"]})
    assert answer.json()["version"] == first["version"]
    answer = await ops.post(f"{LEGAL}/rollback", json={"version": "legal@ffffffffffff"})
    assert answer.status_code == 404 and first["version"] in answer.json()["error"]["message"]


async def test_pins(ops: httpx.AsyncClient, folders: list[Path]) -> None:
    assert (await put(ops, folders[0], pinned=True))["pinned"]
    assert not (await ops.put(LEGAL, json={"pinned": False})).json()["pinned"]
    assert (await ops.put("/admin/adapters/none", json={"pinned": True})).status_code == 404


async def test_an_etag_is_a_condition(ops: httpx.AsyncClient, folders: list[Path]) -> None:
    body = {"source": str(folders[0])}
    first = (await ops.put(LEGAL, json=body, headers={"if-match": '"0"'})).headers["etag"]
    assert (await ops.get(LEGAL)).headers["etag"] == first
    assert (await ops.put(LEGAL, json=body, headers={"if-match": '"99"'})).status_code == 412
    body = {"source": str(folders[1])}
    answer = await ops.put(LEGAL, json=body, headers={"if-match": first})
    assert answer.status_code == 200 and answer.headers["etag"] != first
    stale = await ops.post(f"{LEGAL}/rollback", headers={"if-match": first})
    assert (stale.status_code, stale.json()["error"]["code"]) == (412, "precondition_failed")
    assert (await ops.delete(LEGAL, headers={"if-match": "W/x"})).status_code == 400


async def test_a_refusal_is_history_with_its_reason(
    ops: httpx.AsyncClient, folders: list[Path], tmp_path: Path
) -> None:
    await put(ops, folders[0])
    bad = write_lora(tmp_path / "bad", {MODULE: (8, 7)})
    answer = await ops.put(LEGAL, json={"source": str(bad)})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, MODULE)
    refused, made = (await ops.get(f"{LEGAL}/history")).json()["data"]
    assert (refused["result"], made["result"]) == ("refused", "ok")
    assert refused["reason"] == answer.json()["error"]["message"] and refused["who"] == "ops"
    assert len((await ops.get(f"{LEGAL}/history?limit=1")).json()["data"]) == 1


async def test_what_is_not_there_is_404(ops: httpx.AsyncClient) -> None:
    for method, path in (
        ("GET", ""), ("DELETE", ""), ("GET", "/history"), ("POST", "/promote"),
        ("POST", "/rollback"), ("DELETE", "/canary"),
    ):  # fmt: skip
        answer = await ops.request(method, LEGAL + path)
        assert answer.status_code == 404, (method, path, answer.text)


class TestControllers:
    """vLLM's routes, bodies, texts and statuses."""

    async def load(self, ops: httpx.AsyncClient, folder: Path, **more: Any) -> httpx.Response:
        body = {"lora_name": "legal", "lora_path": str(folder), **more}
        return await ops.post("/v1/load_lora_adapter", json=body)

    async def test_load_and_unload(
        self, ops: httpx.AsyncClient, serving: Serving, folders: list[Path]
    ) -> None:
        answer = await self.load(ops, folders[0])
        assert (answer.status_code, answer.text) == (
            200,
            "Success: LoRA adapter 'legal' added successfully.",
        )
        assert serving.pool.get("legal") is not None
        answer = await ops.post("/v1/unload_lora_adapter", json={"lora_name": "legal"})
        assert (answer.status_code, answer.text) == (
            200,
            "Success: LoRA adapter 'legal' removed successfully.",
        )
        assert serving.pool.get("legal") is None

    async def test_a_repeated_load_is_what_controllers_take_for_success(
        self, ops: httpx.AsyncClient, serving: Serving, folders: list[Path]
    ) -> None:
        await self.load(ops, folders[0])
        before = serving.pool.get("legal")
        answer = await self.load(ops, folders[1])
        assert answer.status_code == 400 and "has already been loaded" in answer.text
        assert serving.pool.get("legal") is before
        assert (await self.load(ops, folders[1], load_inplace=True)).status_code == 200
        assert serving.pool.get("legal") is not before

    @pytest.mark.parametrize(
        ("path", "body", "status"),
        [
            ("load", {"lora_name": "", "lora_path": "/a"}, 400),
            ("load", {"lora_name": "base", "lora_path": "/a"}, 400),
            ("load", {"lora_name": "legal"}, 400),
            ("load", {"lora_name": "legal", "lora_path": "/nowhere"}, 404),
            ("load", {"lora_name": "x", "lora_path": "/a", "is_3d_lora_weight": True}, 400),
            ("unload", {"lora_name": ""}, 400),
            ("unload", {"lora_name": "ghost"}, 404),
        ],
    )
    async def test_what_cannot_be(
        self, ops: httpx.AsyncClient, path: str, body: dict[str, Any], status: int
    ) -> None:
        answer = await ops.post(f"/v1/{path}_lora_adapter", json=body)
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["message"]


@pytest.mark.parametrize("name", ["base", "a/../b", "a//b", "a/."])
async def test_names_that_cannot_be_are_refused_by_every_route(
    ops: httpx.AsyncClient, serving: Serving, folders: list[Path], name: str
) -> None:
    body = {"lora_name": name, "lora_path": str(folders[0])}
    loaded = await ops.post("/v1/load_lora_adapter", json=body)
    assert loaded.status_code == 400 and loaded.json()["error"]["param"] == "alias"
    quoted = name.replace(".", "%2e")
    put = await ops.put(f"/admin/adapters/{quoted}", json={"source": str(folders[0])})
    # The gate tidies doubled slashes away, clients and routers tidy dots: then it is another name.
    assert put.status_code in (400, 404) or put.json()["alias"] != name
    assert await serving.registry.alias(name) is None


async def test_an_alias_that_fails_here_for_its_name_says_so_and_can_be_deleted(
    ops: httpx.AsyncClient, serving: Serving, folders: list[Path]
) -> None:
    """As another replica, whose base has another name, made it."""
    made = await put(ops, folders[0])
    row = Alias("base", made["digest"])
    await serving.registry.change(lambda _: row, Event("base", "put", "them"))
    assert await serving.reconciler.turn()
    told = (await ops.get("/admin/adapters/base")).json()
    assert (told["state"], told["reason"]) == ("failed", "'base' is the base model's name")
    assert (await ops.delete("/admin/adapters/base")).status_code == 200
    assert serving.reconciler.failures == {}


@pytest.mark.parametrize(
    ("path", "body", "match"),
    [
        (LEGAL, {"source": "x" * 100_000}, "*"),
        (f"{LEGAL}/canary", {"version": "x" * 100_000, "weight": 1}, "*"),
        (LEGAL, {"source": "/x"}, "9" * 5000),
    ],
    ids=["source", "version", "revision"],
)
async def test_what_is_too_long_is_refused_and_not_kept(
    ops: httpx.AsyncClient, path: str, body: dict[str, Any], match: str
) -> None:
    answer = await ops.put(path, json=body, headers={"if-match": match})
    assert answer.status_code in (400, 422)
    assert (await ops.get(f"{LEGAL}/history")).status_code == 404
