"""`proof.served`: a server that is started, timed and stopped, whatever happens in between."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import torch
from httpx2 import Client

from quant.errors import CompareError
from quant.proof import served
from quant.proof.served import Answer, Served

SLEEPER = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]


@contextmanager
def speaking(status: int, said: bytes, promised: int | None = None) -> Iterator[Client]:
    """A client of something that answers every request so, `promised` bytes announced."""

    class Speaker(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            self.send_header("content-length", str(len(said) if promised is None else promised))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Speaker) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Client(base_url=f"http://127.0.0.1:{server.server_port}", trust_env=False) as client:
            yield client
        server.shutdown()


def stream(*parts: object) -> bytes:
    lines = [f"data: {json.dumps(part)}\n\n" for part in parts]
    return "".join([*lines, "data: [DONE]\n\n"]).encode()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "server.log"
    path.write_text("first\nlast words\n")
    return path


def piece(tokens: int) -> dict[str, object]:
    return {"choices": [{"text": "a" * tokens}], "usage": {"completion_tokens": tokens}}


def test_an_answer_has_its_times_and_its_tokens(log: Path) -> None:
    """Several tokens may come in one piece, and a piece may come before any."""
    end = {"choices": [], "usage": {"completion_tokens": 9}}
    with speaking(200, stream(piece(0), piece(2), piece(3), piece(9), end)) as client:
        answer = served.timed(client, {}, log)
    assert (answer.first_tokens, answer.tokens) == (2, 9)
    assert 0 < answer.first_s <= answer.last_s


def test_a_token_takes_what_those_after_the_first_piece_took() -> None:
    assert Answer(0.5, 1.2, 2, 9).next_s() == pytest.approx(0.1)
    assert Answer(1.8, 1.8, 9, 9).next_s() == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("status", "said", "promised", "told"),
    [
        (404, b'{"error": "no such model"}', None, "answered 404: .*no such model"),
        (200, stream({"choices": [], "usage": None}), None, "answered with nothing"),
        (200, stream(piece(1)), 10_000, "broke off"),
    ],
)
def test_an_answer_that_is_none_is_told_with_the_end_of_the_log(
    log: Path, status: int, said: bytes, promised: int | None, told: str
) -> None:
    with speaking(status, said, promised) as client, pytest.raises(CompareError, match=told) as at:
        served.timed(client, {}, log)
    assert str(at.value).endswith("the end of its log:\nfirst\nlast words")


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    """The real command, on a folder that holds no model."""
    with pytest.raises(CompareError, match="the server ended with status 2") as caught:
        served.measured(Served(tmp_path), [torch.arange(64)])
    assert "the end of its log:" in str(caught.value) and "config.json" in str(caught.value)


def test_what_cannot_be_served_here_is_refused_before_anything() -> None:
    with pytest.raises(CompareError, match="no_such_engine is not installed here"):
        served.check("no_such_engine")
    with pytest.raises(CompareError, match="quantserve is not installed here"):
        served.check("json", Path("/nowhere/quantserve"))


@pytest.mark.parametrize("fault", [KeyboardInterrupt, CompareError])
def test_the_server_is_stopped_when_the_measuring_is(log: Path, fault: type[BaseException]) -> None:
    with pytest.raises(fault), served.running(SLEEPER, log) as process:
        raise fault
    assert process.returncode == -signal.SIGTERM


def test_a_server_that_will_not_end_is_killed(log: Path) -> None:
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    command = [*SLEEPER[:2], deaf + SLEEPER[2]]
    with served.running(command, log, grace_s=0.2) as process:
        while "up" not in log.read_text():
            assert process.poll() is None
            time.sleep(0.02)
    assert process.returncode == -signal.SIGKILL


def test_the_server_is_stopped_when_we_are_killed(log: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from quant.proof import served\n"
        f"with served.running({SLEEPER!r}, Path({str(log)!r})) as process:\n"
        "    print(process.pid, flush=True)\n"
        "    while 'up' not in Path(sys.argv[1]).read_text(): time.sleep(0.05)\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", program, str(log)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as ours:
        assert ours.stdout is not None
        server = psutil.Process(int(ours.stdout.readline()))
        assert ours.stdout.readline() == "ready\n" and server.is_running()
        ours.kill()
    server.wait(60)
    assert not server.is_running()
