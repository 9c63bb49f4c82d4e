"""What is killed or stopped is replaced, somebody answering all the time, and clients are told; a
stopped server finishes first.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from tests.e2e.server import START_TIMEOUT_S, Server, serving

pytestmark = pytest.mark.e2e

STILL_ALIVE_S = 10  # a hang: on a quiet machine it is under one


@pytest.fixture(scope="module")
def fragile(w4a16: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of our own to hurt."""
    folder = tmp_path_factory.mktemp("fragile")
    with serving(w4a16, folder, "--model-name", "base") as server:
        server.until_ready()
        yield server


def descendants(server: Server) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


def wait_until_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=300)
    assert not alive


def put(server: Server, folder: Path) -> None:
    with server.http() as api:
        reply = api.put("/admin/adapters/swapped", json={"path": str(folder)})
        assert reply.status_code == 200, reply.text


def test_a_killed_worker_is_replaced_and_the_parent_answers_meanwhile(fragile: Server) -> None:
    old, before = descendants(fragile), fragile.answer("base")
    worker = next(child for child in old if "serve.worker" in " ".join(child.cmdline()))
    worker.kill()
    wait_until_gone(old)
    with pytest.raises(openai.InternalServerError) as refusal:
        fragile.answer("base")
    assert refusal.value.code == "server_not_ready"
    fragile.until_ready()
    assert fragile.answer("base").is_as(before)


class Stream(threading.Thread):
    """A client in the middle of a long stream; `fault` is the error event that ended it."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self._server, self.begun, self.fault = server, threading.Event(), ""
        self.start()
        assert self.begun.wait(START_TIMEOUT_S)

    def run(self) -> None:
        with self._server.client() as client:
            stream = client.completions.create(
                model="base", prompt="Once upon a time", max_tokens=4000, stream=True,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            try:
                for _ in stream:
                    self.begun.set()
            except (openai.APIError, httpx.HTTPError) as fault:
                self.fault = str(fault)

    def ended_with(self) -> str:
        self.join(START_TIMEOUT_S)
        return self.fault


def strike(server: Server, victim: str, sign: signal.Signals) -> None:
    """Send a signal to EngineCore, or to serve.worker."""
    named = (child for child in descendants(server) if victim in " ".join(child.cmdline()))
    next(named).send_signal(sign)


class Probes(threading.Thread):
    """Asks /livez again and again; `worst` is the longest that it took."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self._server, self._over, self.worst, self.asked = server, threading.Event(), 0.0, 0
        self.start()

    def run(self) -> None:
        while not self._over.wait(0.05):
            began = time.monotonic()
            assert httpx.get(f"{self._server.url}/livez", timeout=300).status_code == 200
            self.worst, self.asked = max(self.worst, time.monotonic() - began), self.asked + 1

    def over(self) -> None:
        self._over.set()
        self.join()


@pytest.mark.parametrize(
    ("sign", "reason"), [(signal.SIGKILL, "engine_died"), (signal.SIGSTOP, "engine_hung")]
)
def test_clients_of_an_engine_that_dies_or_stands_still_are_told(
    fragile: Server, sign: signal.Signals, reason: str
) -> None:
    probes, stream = Probes(fragile), Stream(fragile)
    strike(fragile, "EngineCore", sign)
    assert stream.ended_with()
    assert httpx.get(f"{fragile.url}/readyz", timeout=300).status_code == 503
    fragile.until_ready()
    probes.over()
    assert probes.asked and probes.worst < STILL_ALIVE_S
    with fragile.http() as api:
        assert f'quantserve_last_restart_info{{reason="{reason}"}} 1.0' in api.get("/metrics").text
    assert fragile.answer("base").tokens


def test_a_stopped_worker_is_found_and_replaced(fragile: Server) -> None:
    probes = Probes(fragile)
    strike(fragile, "serve.worker", signal.SIGSTOP)
    while "the API was stopped by a signal" not in fragile.log.read_text():
        assert httpx.get(f"{fragile.url}/livez", timeout=300).status_code == 200
        time.sleep(0.1)
    fragile.until_ready()
    probes.over()
    assert probes.worst < STILL_ALIVE_S


def drained(server: Server) -> None:
    """An administrator's drain leaves a live server that admits nobody."""
    with server.http() as api:
        assert api.post("/admin/drain").status_code == 200
        for path in ("/readyz", "/health"):
            assert api.get(path).status_code == api.head(path).status_code == 503
        assert api.get("/livez").status_code == api.head("/livez").status_code == 200
    with pytest.raises(openai.InternalServerError) as refusal:
        server.answer("base")
    assert refusal.value.code == "server_draining"


def test_a_drain_and_sigterm_finish_running_streams_and_leaves_no_process(
    fragile: Server, loras: list[Path]
) -> None:
    """The stream holds a version that was swapped meanwhile, and gives it back in the end."""
    old = descendants(fragile)
    put(fragile, loras[0])
    pieces: list[str] = []

    def long_stream() -> None:
        with fragile.client() as client:
            stream = client.completions.create(
                model="swapped", prompt="Once upon a time", max_tokens=120, stream=True,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            pieces.extend(chunk.choices[0].text for chunk in stream)

    reader = threading.Thread(target=long_stream)
    reader.start()
    while len(pieces) < 3:
        time.sleep(0.05)
    put(fragile, loras[1])
    drained(fragile)
    os.kill(fragile.process.pid, signal.SIGTERM)
    reader.join(60)
    assert len(pieces) == 120
    assert fragile.process.wait(60) == 0
    wait_until_gone(old)
    said = fragile.log.read_text().rpartition("ready after")[2]  # of the last worker alone
    assert "never retrieved" not in said and "could not leave the engine" not in said, said
    assert "Traceback" not in said, said  # an engine that was stopped did not die
