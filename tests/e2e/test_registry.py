"""Two replicas on one PostgreSQL, more adapters than slots, and engines that die."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from serve.adapters.canary import share_of
from tests.e2e.server import GREEDY, KEY, QUESTION, Answer, Server, chat, serving
from tests.postgres import Postgres

pytestmark = pytest.mark.e2e

SLOTS = 3  # two for adapters, one that is free for a swap
FLAGS = ("--model-name", "base", "--max-adapters", str(SLOTS - 1))


@pytest.fixture(scope="module")
def registry(postgres: Postgres) -> str:
    return postgres.fresh()


@pytest.fixture(scope="module")
def one(w4a16: Path, registry: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("one")
    with serving(
        w4a16, folder, *FLAGS, replica="one", database_url=registry, adapter_wait=8,
        max_cached_adapters=SLOTS,
    ) as server:  # fmt: skip
        server.until_ready()
        yield server


@pytest.fixture(scope="module")
def api(one: Server) -> Iterator[httpx.Client]:
    with one.http() as client:
        yield client


@pytest.fixture(scope="module")
def aliases(api: httpx.Client, loras: list[Path]) -> dict[str, Path]:
    """Twice as many aliases as slots, and as adapters that host memory keeps."""
    named = {f"a{number}": loras[number % 3] for number in range(2 * SLOTS)}
    for alias, folder in named.items():
        answer = api.put(f"/admin/adapters/{alias}", json={"source": str(folder)})
        assert answer.status_code == 200, answer.text
    return named


def test_more_adapters_than_slots_answer_as_alone(one: Server, aliases: dict[str, Path]) -> None:
    alone = {alias: one.answer(alias) for alias in aliases}
    assert len(set(map(str, alone.values()))) == 3, f"the adapters do not show: {alone}"

    async def together() -> list[Answer]:
        async with one.async_client() as client:
            patient = client.with_options(max_retries=20)  # as the wait for a slot is short here
            asked = [
                patient.chat.completions.create(model=alias, messages=chat(), **GREEDY)
                for alias in aliases
            ]
            told = [reply.choices[0].logprobs for reply in await asyncio.gather(*asked)]
            return [Answer.of(each.content or () if each else ()) for each in told]

    try:
        assert all(map(Answer.is_as, asyncio.run(together()), alone.values()))
    finally:
        assert one.answer("base").tokens


def test_a_request_that_finds_no_slot_is_told_when_to_come_back(
    one: Server, aliases: dict[str, Path]
) -> None:
    held, late = list(aliases)[:SLOTS], list(aliases)[-1]

    async def refused() -> httpx.Response:
        headers = {"authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=one.url, headers=headers, timeout=300) as client:
            streams = [asyncio.create_task(long_stream(client, alias)) for alias in held]
            try:
                await until_running(client, SLOTS)
                body = {"model": late, "messages": chat(), "stream": True}
                return await client.post("/v1/chat/completions", json=body)
            finally:
                for stream in streams:
                    stream.cancel()
                await asyncio.gather(*streams, return_exceptions=True)

    answer = asyncio.run(refused())
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "adapter_slots_full")
    assert int(answer.headers["retry-after"]) > 0
    assert one.answer(late).tokens


async def long_stream(client: httpx.AsyncClient, alias: str) -> None:
    body: dict[str, Any] = {
        "model": alias, "prompt": "Once", "max_tokens": 3000, "ignore_eos": True, "stream": True,
    }  # fmt: skip
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        async for _ in answer.aiter_bytes():
            pass


async def until_running(client: httpx.AsyncClient, count: int) -> None:
    while True:
        facts = (await client.get("/admin/adapters")).json()["data"]
        if sum(fact["requests"] > 0 for fact in facts) >= count:
            return
        await asyncio.sleep(0.05)


def test_a_user_stays_with_a_version_by_header_and_by_body(
    api: httpx.Client, aliases: dict[str, Path], loras: list[Path]
) -> None:
    path = "/admin/adapters/a0"
    stable = api.get(path).json()["version"]
    made = api.put(f"{path}/canary", json={"source": str(loras[1]), "weight": 0.5}).json()
    expected = {True: made["canary"]["version"], False: stable}
    for number in range(6):
        user = f"user{number}"
        ask = {"model": "a0", "messages": chat(), "max_tokens": 1}
        by_header = api.post("/v1/chat/completions", json=ask, headers={"x-session-id": user})
        by_body = api.post("/v1/chat/completions", json={**ask, "user": user})
        told = {reply.headers["x-quantserve-adapter"] for reply in (by_header, by_body)}
        assert told == {expected[share_of("a0", user) < 0.5]}
    assert api.post(f"{path}/promote").json()["version"] == expected[True]
    assert api.post(f"{path}/rollback").json()["version"] == stable


def test_a_pinned_adapter_is_swapped_and_unpinned_while_others_take_turns(
    one: Server, api: httpx.Client, aliases: dict[str, Path], loras: list[Path]
) -> None:
    path, before = "/admin/adapters/a1", one.answer("a2")
    assert api.put(path, json={"pinned": True}).json()["pinned"]
    for folder in (loras[2], loras[1]):
        assert api.put(path, json={"source": str(folder)}).status_code == 200
        for alias in aliases:
            assert one.answer(alias).tokens
    assert one.answer("a1").is_as(one.answer("a4"))  # the same adapter, pinned and not
    assert not api.put(path, json={"pinned": False}).json()["pinned"]
    assert one.answer("a1").is_as(one.answer("a4")) and one.answer("a2").is_as(before)


def test_controllers_find_vllms_routes(
    one: Server, api: httpx.Client, loras: list[Path], aliases: dict[str, Path]
) -> None:
    body = {"lora_name": "controlled", "lora_path": str(loras[0])}
    assert api.post("/v1/load_lora_adapter", json=body).status_code == 200
    repeated = api.post("/v1/load_lora_adapter", json=body)
    assert repeated.status_code == 400 and "has already been loaded" in repeated.text
    assert one.answer("controlled").is_as(one.answer("a3"))
    assert api.post("/v1/unload_lora_adapter", json=body).status_code == 200
    assert api.post("/v1/unload_lora_adapter", json=body).status_code == 404


@pytest.mark.parametrize("victim", ["EngineCore", "serve.worker"])
def test_a_killed_process_comes_back_with_every_alias(
    one: Server, api: httpx.Client, aliases: dict[str, Path], victim: str
) -> None:
    def versions() -> dict[str, str]:
        return {
            fact["alias"]: fact["version"] for fact in api.get("/admin/adapters").json()["data"]
        }

    api.put("/admin/adapters/a5", json={"pinned": True}).raise_for_status()
    expected, answers = versions(), (one.answer("base"), one.answer("a5"))
    children = psutil.Process(one.process.pid).children(recursive=True)
    next(child for child in children if victim in " ".join(child.cmdline())).kill()
    psutil.wait_procs(children, timeout=300)
    one.until_ready()
    assert versions() == expected
    assert one.answer("base").is_as(answers[0]) and one.answer("a5").is_as(answers[1])
    history = api.get("/admin/adapters/a5/history").json()["data"]
    assert [row["action"] for row in history].count("put") == 1  # nobody put it again


def test_a_second_replica_serves_what_the_first_was_told(
    one: Server, api: httpx.Client, w4a16: Path, registry: str, loras: list[Path],
    aliases: dict[str, Path], tmp_path: Path,
) -> None:  # fmt: skip
    with serving(w4a16, tmp_path, *FLAGS, database_url=registry, replica="two") as two:
        two.until_ready()
        with two.http() as other:
            wanted = [fact["version"] for fact in api.get("/admin/adapters").json()["data"]]
            found = [fact["version"] for fact in other.get("/admin/adapters").json()["data"]]
            assert found == wanted
            assert two.answer("a4").is_as(one.answer("a4"))
            other.put("/admin/adapters/late", json={"source": str(loras[2])}).raise_for_status()
            end = time.monotonic() + 60
            while api.get("/admin/adapters/late").status_code != 200:
                assert time.monotonic() < end, "the first replica did not follow"
                time.sleep(0.2)
            assert one.answer("late", QUESTION).is_as(two.answer("late", QUESTION))
            replicas = api.get("/admin/adapters/a4").json()["replicas"]
            assert {row["replica"] for row in replicas} == {"one", "two"}
