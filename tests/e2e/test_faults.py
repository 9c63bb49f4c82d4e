"""A killed worker is replaced, its parent answering meanwhile; a stopped server finishes first."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest

from tests.e2e.server import Server, serving

pytestmark = pytest.mark.e2e


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
    _, alive = psutil.wait_procs(processes, timeout=30)
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


def test_sigterm_finishes_running_streams_and_leaves_no_process(
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
    os.kill(fragile.process.pid, signal.SIGTERM)
    reader.join(60)
    assert len(pieces) == 120
    assert fragile.process.wait(60) == 0
    wait_until_gone(old)
    said = fragile.log.read_text()
    assert "never retrieved" not in said and "could not leave the engine" not in said, said
    assert "Traceback" not in said, said  # an engine that was stopped did not die
