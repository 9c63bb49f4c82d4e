"""`kill -9` of the engine, of the worker and of the parent in the middle of swaps under load."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil
import pytest

from bench.versions import ALIASES, BASE, PROMPTS, Answer, Client, Solo, learn, write_versions
from tests.e2e.server import KEY, START_TIMEOUT_S, Server, serving

pytestmark = pytest.mark.e2e

FLAGS = ("--model-name", BASE, "--max-adapters", str(2 * len(ALIASES)))
ANSWERS_BEFORE = 12  # swaps follow each other until then
INTO_THE_PUT_S = 0.05


@dataclass
class Seen:
    """What the clients of a server saw until it was killed."""

    answers: list[Answer] = field(default_factory=list)
    acknowledged: dict[str, str] = field(default_factory=dict)  # alias -> version
    cut_short: str = ""  # the alias whose PUT never was answered


@dataclass(frozen=True)
class Served:
    server: Server
    state: Path
    folders: dict[str, list[Path]]
    solo: Solo

    def client(self, session: aiohttp.ClientSession) -> Client:
        return Client(session, self.folders)


def session(server: Server) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        server.url,
        headers={"authorization": f"Bearer {KEY}"},
        connector=aiohttp.TCPConnector(force_close=True),
        timeout=aiohttp.ClientTimeout(total=START_TIMEOUT_S),
    )


@pytest.fixture(scope="module")
def served(w4a16: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Three aliases of two versions each, on a server that keeps its registry."""
    folder = tmp_path_factory.mktemp("kills")
    folders = write_versions(folder, w4a16)

    async def solo(server: Server) -> Solo:
        async with session(server) as asking:
            return await learn(Client(asking, folders), PROMPTS[:3])

    state = folder / "state"
    with serving(w4a16, folder, *FLAGS, state_dir=state) as server:
        server.until_ready()
        yield Served(server, state, folders, asyncio.run(solo(server)))


def descendants(server: Server) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


def until_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=300)
    assert not alive


def kill(server: Server, victim: str) -> None:
    next(child for child in descendants(server) if victim in " ".join(child.cmdline())).kill()


async def until_killed(served: Served, strike: Callable[[], None]) -> Seen:
    """Streams of every model and swap after swap; `strike` in the middle of one of those."""
    seen = Seen()
    async with session(served.server) as asking, asyncio.TaskGroup() as group:
        client = served.client(asking)
        for model in (BASE, *ALIASES):
            group.create_task(stream(client, model, served.solo, seen))
            group.create_task(stream(client, model, served.solo, seen))
        turns = itertools.cycle(itertools.product((0, 1), ALIASES))
        while len(seen.answers) < ANSWERS_BEFORE:
            which, alias = next(turns)
            seen.acknowledged[alias] = await client.put(alias, which)
        which, seen.cut_short = next(turns)
        cut = asyncio.create_task(client.put(seen.cut_short, which))
        await asyncio.sleep(INTO_THE_PUT_S)
        strike()
        outcome = (await asyncio.gather(cut, return_exceptions=True))[0]
        assert isinstance(outcome, Exception), f"the swap was over: {outcome}"
    return seen


async def stream(client: Client, model: str, solo: Solo, seen: Seen) -> None:
    """Ask again and again, until the server is gone."""
    while True:
        for prompt in solo.prompts:
            answer = await client.ask(model, prompt)
            if answer.fault:
                return
            seen.answers.append(answer)


async def answers_after(server: Server, served: Served) -> tuple[dict[str, str], list[Answer]]:
    """The version of every alias as the registry wants and serves it, and what all models say."""
    async with session(server) as asking:
        async with asking.get("/admin/adapters") as told:
            facts = (await told.json())["data"]
        assert all(f["state"] == "serving" and f["version"] == f["wanted"] for f in facts)
        client = served.client(asking)
        asked = [(model, p) for model in (BASE, *ALIASES) for p in served.solo.prompts]
        answers = await asyncio.gather(*(client.ask(model, prompt) for model, prompt in asked))
    return {fact["alias"]: fact["version"] for fact in facts}, answers


def check(seen: Seen, versions: dict[str, str], after: list[Answer], solo: Solo) -> None:
    """Every alias is back at its last version, and no answer before or after was mixed."""
    assert set(versions) == set(ALIASES)
    for alias, version in seen.acknowledged.items():
        assert version == versions[alias] or alias == seen.cut_short
    assert all(answer.version == versions.get(answer.model, "") for answer in after)
    assert not any(answer.fault for answer in after)
    assert all(solo.right(answer) for answer in seen.answers + after)


@pytest.mark.parametrize("victim", ["EngineCore", "serve.worker"])
def test_a_child_killed_in_a_swap_comes_back_with_every_alias(served: Served, victim: str) -> None:
    server, old = served.server, descendants(served.server)
    seen = asyncio.run(until_killed(served, lambda: kill(server, victim)))
    until_gone(old)
    server.until_ready()
    check(seen, *asyncio.run(answers_after(server, served)), served.solo)


def test_a_parent_killed_in_a_swap_takes_all_along_and_its_command_starts_again(
    served: Served, w4a16: Path, tmp_path: Path
) -> None:
    server, old = served.server, descendants(served.server)
    seen = asyncio.run(until_killed(served, server.process.kill))
    until_gone(old)
    port = int(server.url.rpartition(":")[2])
    with serving(w4a16, tmp_path, *FLAGS, port=port, state_dir=served.state) as again:
        again.until_ready()
        check(seen, *asyncio.run(answers_after(again, served)), served.solo)
