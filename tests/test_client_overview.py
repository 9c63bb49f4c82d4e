"""`quantserve ps`: what is served, out of the routes of a server in each of its states."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from serve.client import adapters, overview
from serve.client.connection import Address, Connection, ServerError
from serve.errors import NotReady
from tests.answering import KEY, Answering, speaking


@pytest.fixture
async def connection(live: Answering, folders: list[Path]) -> AsyncIterator[Connection]:
    """To a server with an alias that has a canary, and kernels."""
    live.serving.layers = [{"W4A16 on avx512 (quantserve)": 210, "bfloat16": 1}]
    async with Connection(Address(live.url, KEY)) as made:
        await adapters.put(made, "legal", str(folders[0]), lambda _: None)
        await adapters.canary(made, "legal", str(folders[1]), 12.5, lambda _: None)
        yield made


async def test_people_see_base_load_and_adapters(live: Answering, connection: Connection) -> None:
    status, out, err = await live.quantserve("ps")
    assert (status, err) == (0, "")
    (legal,) = await adapters.listed(connection)
    head, _, table = out.partition("\n\n")
    told = dict(line.split(None, 1) for line in head.splitlines())
    assert told.pop("up").count(":") == 2 and told.pop("vLLM").startswith("0.3")
    assert told == {
        "server": live.url,
        "state": "ready",
        "base": "base, context 2048",
        "layers": "210 x W4A16 on avx512 (quantserve), 1 x bfloat16",
        "requests": "3 running, 0 waiting",
    }
    canary = f"{legal['canary']['version']} 12.5 % serving"
    assert " ".join(table.split()) == (
        "ALIAS VERSION STATE CANARY PINNED RANK REQUESTS "
        f"legal {legal['version']} serving {canary} - 4 0"
    )


async def test_programs_get_the_servers_own_facts(live: Answering, connection: Connection) -> None:
    status, out, _ = await live.quantserve("ps", "--json")
    told = json.loads(out)
    assert status == 0 and told["adapters"] == await adapters.listed(connection)
    assert (told["running"], told["waiting"], told["state"]) == (3, 0, "ready")


async def test_a_server_that_drains_is_told_whole(live: Answering, connection: Connection) -> None:
    live.serving.drain()
    told = await overview.gathered(connection)
    assert told["state"] == "draining" and "shutting down" in told["reason"]
    assert told["base"] == "base" and told["adapters"]


async def test_of_one_that_loads_only_that_is_known() -> None:
    """As the waiting room answers all of its routes."""
    loading = speaking(503, NotReady("the model is loading").body())
    async with loading as url, Connection(Address(url)) as asked:
        told = await overview.gathered(asked)
    lines = overview.lines(told)
    assert lines == [f"server    {url}", "state     not ready: the model is loading"]


async def test_a_key_that_may_not_look_is_told_so(live: Answering) -> None:
    async with Connection(Address(live.url, "sk-app-0123456789")) as asked:
        with pytest.raises(ServerError, match="lacks the scope 'admin'"):
            await overview.gathered(asked)


async def test_what_is_not_served_says_why(connection: Connection) -> None:
    (legal,) = await adapters.listed(connection)
    legal["canary"] |= {"state": "failed", "reason": "the disk\x1b[2J is full"}
    assert overview.table([legal])[-1] == f"{legal['canary']['wanted']}: the disk[2J is full"


def test_a_gauge_is_summed_over_its_series_and_no_other() -> None:
    page = 'a_by 5\n# a 7\na{x="{1}"} 1.0\na{x="2"} 2.0\nab 9\n'
    assert (overview.gauge(page, "a"), overview.gauge(page, "b")) == (3, None)
