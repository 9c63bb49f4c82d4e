"""`quantserve adapter put` and the like against our admin routes, as an operator calls them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from serve.adapters.rows import Alias, Event
from serve.cli import app
from serve.client import adapters
from serve.client.connection import Address, Connection, ServerError
from serve.errors import SettingsError
from tests.answering import KEY, QUANTSERVE, Answering, speaking
from tests.fakes import MODULE
from tests.lora import write_lora


@pytest.fixture
async def connection(live: Answering) -> AsyncIterator[Connection]:
    async with Connection(Address(live.url, KEY)) as made:
        yield made


def unheard(_: str) -> None:
    """What is said on the way."""


async def test_the_life_of_an_alias(connection: Connection, folders: list[Path]) -> None:
    alias, sources = "team/legal", list(map(str, folders))
    first = await adapters.put(connection, alias, sources[0], unheard)
    second = await adapters.canary(connection, alias, sources[1], 12.5, unheard)
    assert second["version"] == first["version"] and second["canary"]["weight"] == 0.125
    wider = await adapters.canary(connection, alias, None, 50, unheard)
    assert wider["canary"] == second["canary"] | {"weight": 0.5}
    promoted = await adapters.promote(connection, alias, unheard)
    assert (promoted["version"], promoted["canary"]) == (second["canary"]["version"], None)
    back = await adapters.roll_back(connection, alias, None, unheard)
    assert back["version"] == first["version"]
    named = await adapters.roll_back(connection, alias, promoted["version"], unheard)
    assert named["version"] == promoted["version"]
    old = await adapters.canary(connection, alias, first["version"], 1, unheard)
    assert old["canary"]["version"] == first["version"]
    assert (await adapters.drop_canary(connection, alias))["canary"] is None
    (row,) = await adapters.listed(connection)
    assert (row["alias"], row["version"]) == (alias, named["version"])
    assert (await adapters.remove(connection, alias))["deleted"]
    assert await adapters.listed(connection) == []


async def test_a_folder_goes_by_its_absolute_path_and_people_are_told_the_states(
    live: Answering, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folders[0].parent)
    status, out, err = await live.quantserve("adapter", "put", "legal", folders[0].name)
    (row,) = live.serving.reconciler.rows.values()
    version = f"legal@{row.stable[:12]}"
    assert (status, out) == (0, f"legal is served by {version}\n")
    assert err == f"legal: asked for {folders[0].resolve()}\n{version}: serving\n"
    _, out, _ = await live.quantserve("adapter", "list")
    heads, line = out.splitlines()
    assert line.split() == ["legal", version, "serving", "-", "-", "4", "0"]
    assert heads.index("STATE") == line.index("serving") and not line.endswith(" ")


async def test_a_refusal_is_the_servers_own_words(
    live: Answering, folders: list[Path], tmp_path: Path
) -> None:
    bad = write_lora(tmp_path / "bad", {MODULE: (8, 7)})
    told = await live.refused("adapter", "put", "legal", bad)
    (event,) = await live.serving.registry.history("legal", 1)
    assert told == event["reason"]
    assert await live.refused("adapter", "rm", "legal") == "there is no adapter 'legal'"
    assert "admin" in await live.refused("adapter", "list", QUANTSERVE_API_KEY="sk-app-0123456789")


async def test_a_folder_that_only_the_client_sees(live: Answering, tmp_path: Path) -> None:
    error = {"message": "adapter folder /lora is not there", "param": "folder"}
    async with speaking(422, {"error": error}) as url:
        told = await live.refused("adapter", "put", "legal", tmp_path, "--server", url)
    assert told.startswith("adapter folder /lora is not there; the folder is here, and the server")
    assert url in told and "s3://" in told


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("put", "legal", "./nowhere"), "./nowhere does not exist here"),
        (("put", "legal", __file__), "is a file"),
        (("put", "a@b", "s3://x/y"), "use letters, digits"),
        (("rm", "../engine"), "between slashes"),
        (("canary", "legal", "s3://x/y"), "expected --percent N"),
        (("canary", "legal", "--drop", "--percent", "3"), "--drop alone"),
        (("canary", "legal", "--percent", "101"), "from 0 to 100"),
        (("canary", "legal", "--percent", "nan"), "from 0 to 100"),
    ],
    ids=["folder", "file", "alias", "dots", "share", "both", "percent", "nan"],
)
def test_what_makes_no_sense_is_refused_before_anybody_is_asked(
    words: tuple[str, ...], why: str
) -> None:
    done = CliRunner().invoke(app, ["adapter", *words, "--server", "http://127.0.0.1:9"])
    assert isinstance(done.exception, SettingsError) and why in str(done.exception)


async def test_an_interrupt_says_that_the_server_may_go_on(
    live: Answering, folders: list[Path]
) -> None:
    engine: Any = live.serving.pool._engine
    engine.gate.clear()
    process = await asyncio.create_subprocess_exec(
        QUANTSERVE, "adapter", "put", "legal", str(folders[0]),
        env=live.environment(), stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    await engine.asked.wait()
    process.terminate()
    _, err = await process.communicate()
    engine.gate.set()
    assert process.returncode == 2 and "the server may do it all the same" in err.decode()


async def test_what_loads_is_waited_for_and_every_state_is_said(
    live: Answering, connection: Connection, folders: list[Path]
) -> None:
    said: list[str] = []
    facts = await adapters.put(connection, "legal", str(folders[0]), said.append)
    loading = facts | {"state": "loading"}
    found = await adapters.settled(connection, loading, said.append, every_s=0)
    assert found == found | facts
    row = Alias("base", facts["digest"])  # as a replica whose base has another name made it
    await live.serving.registry.change(lambda _: row, Event("base", "put", "them"))
    await live.serving.reconciler.turn()
    with pytest.raises(ServerError, match="is not served: 'base' is the base model's name"):
        await adapters.settled(connection, {**loading, "alias": "base"}, said.append, every_s=0)
    version = facts["version"]
    assert said[1:4] == [f"{version}: serving", f"{version}: loading", f"{version}: serving"]
