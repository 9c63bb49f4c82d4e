"""A real uvicorn on real sockets, held to small limits: what each bad connection is told."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
import websockets.sync.client

from serve import http_limits
from serve.http_limits import HttpLimits

SMALL = HttpLimits(
    line=1000, headers=4000, header_count=20, header_s=1.0, body=50_000, body_s=1.0, write_s=1.0,
    slowest_rate=1 << 20, linger_s=1.0, connections=40,
)  # fmt: skip
OK = b"HTTP/1.1 200 OK"
HANG_S = 300.0  # a test that waits this long has failed
CHUNKED = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"


@dataclass
class App:
    """Echoes the size of a body; `/never-ends` writes until its client is gone."""

    started: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    port: int = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            await send({"type": "websocket.send", "text": "hello"})
            await send({"type": "websocket.close"})
        elif scope["type"] == "http":
            self.started.set()
            await self._answer(scope["path"], receive, send)

    async def _answer(self, path: str, receive: Any, send: Any) -> None:
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.ended.set()
                return
            size += len(message["body"])
            more = message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if path == "/never-ends":
            gone = asyncio.create_task(receive())
            while not gone.done():
                await send({"type": "http.response.body", "body": b"x" * 9999, "more_body": True})
            self.ended.set()
        else:
            body = str(size).encode() if path != "/long" else b"x" * 10_000_000
            await send({"type": "http.response.body", "body": body})


@contextmanager
def running(limits: HttpLimits = SMALL, **uvicorn_settings: Any) -> Iterator[App]:
    app = App()
    config = uvicorn.Config(
        app, http=http_limits.protocol(limits), log_level="error", lifespan="off", loop="uvloop",
        timeout_graceful_shutdown=1, **uvicorn_settings,
    )  # fmt: skip
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    app.port = listener.getsockname()[1]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        yield app
    finally:
        server.should_exit = True
        thread.join(HANG_S)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def served() -> Iterator[App]:
    with running() as app:
        yield app


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + HANG_S
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def connect(app: App) -> socket.socket:
    return socket.create_connection(("127.0.0.1", app.port), HANG_S)


def read_all(client: socket.socket) -> bytes:
    """What comes until the server closes; a reset in place of a clean end fails the test."""
    told = b""
    while piece := client.recv(1 << 16):
        told += piece
    return told


def asked(app: App, *pieces: bytes) -> bytes:
    with connect(app) as client:
        for piece in pieces:
            client.sendall(piece)
        return read_all(client)


def refusal(told: bytes) -> tuple[int, str]:
    """Status and code of an error in OpenAI's shape, which is the last thing on its connection."""
    head, _, body = told.partition(b"\r\n\r\n")
    assert b"connection: close" in head and b"x-request-id: " in head
    fault = json.loads(body)["error"]
    assert set(fault) == {"message", "type", "param", "code"} and fault["message"]
    return int(head.split()[1]), fault["code"]


def test_what_is_within_the_limits_is_served(served: App) -> None:
    line = b"GET /" + b"a" * 900 + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
    assert asked(served, line + b"x: y\r\n" * 18 + b"\r\n").startswith(OK)
    assert asked(served, b"GET / HTTP/1.0\r\n\r\n").startswith(OK)
    body = b"POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 50000\r\n\r\n"
    assert asked(served, body, b"x" * 50_000).endswith(b"50000\r\n0\r\n\r\n")


@pytest.mark.parametrize(
    ("pieces", "status", "code"),
    [
        ([b"GET /" + b"a" * 2000], 414, "uri_too_long"),
        ([b"GET /", *[b"a" * 600] * 3], 414, "uri_too_long"),
        ([b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 30], 431, "headers_too_large"),
        ([b"GET / HTTP/1.1\r\nx: ", *[b"y" * 5000] * 2], 431, "headers_too_large"),
        ([b"GET / HTTP/1.1\r\n", *[b"y" * 1000] * 5], 431, "headers_too_large"),
        ([b"GET / HTTP/1.1\r\n" + b"x: " + b"y" * 3900 + b"\r\nx: " + b"y" * 200 + b"\r\nx"],
         431, "headers_too_large"),
        ([b"\r\n" * 3000], 431, "headers_too_large"),
        ([b"GARBAGE\r\n\r\n"], 400, "invalid_request"),
        ([b"GET / HTTP/1.1\r\ncontent-length: -5\r\n\r\n"], 400, "invalid_request"),
        ([b"GET / HTTP/1.1\r\n\r\n"], 400, "invalid_request"),
        ([b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n"], 400, "invalid_request"),
        ([b"GET / HTTP/2.0\r\nhost: a\r\n\r\n"], 400, "invalid_request"),
        ([b"GET /\r\n\r\n"], 400, "invalid_request"),
        ([b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n"],
         400, "invalid_request"),
        ([b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 50001\r\n\r\n"],
         413, "request_too_large"),
        ([b"POST / HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 50001\r\n\r\n"],
         413, "request_too_large"),
        ([CHUNKED,
          *[b"2710\r\n" + b"x" * 10_000 + b"\r\n"] * 6], 413, "request_too_large"),
        ([CHUNKED + b"1;", *[b"x" * 1000] * 600],
         431, "headers_too_large"),
        ([CHUNKED + b"0\r\nx: ", *[b"x" * 1000] * 600],
         431, "headers_too_large"),
    ],
)  # fmt: skip
def test_what_is_too_large_is_told_so_and_closed(
    served: App, pieces: list[bytes], status: int, code: str
) -> None:
    assert refusal(asked(served, *pieces)) == (status, code)


def test_anthropics_clients_are_told_in_their_own_shape(served: App) -> None:
    told = asked(
        served, b"POST /v1/messages?x HTTP/1.1\r\nhost: x\r\ncontent-length: 50001\r\n\r\n"
    )
    head, _, body = told.partition(b"\r\n\r\n")
    fault = json.loads(body)
    assert (fault["type"], fault["error"]["type"]) == ("error", "request_too_large")
    assert f"x-request-id: {fault['request_id']}".encode() in head


def test_a_line_without_end_is_refused_and_holds_up_nobody(served: App) -> None:
    """16 MB of it, once quadratic in uvicorn, end with the answer in hand."""
    with connect(served) as client:
        client.sendall(b"GET /")
        sent = 0
        try:
            while sent < 16 << 20:
                sent += client.send(b"a" * 65536)
        except OSError:
            pass  # it has stopped listening meanwhile
        assert httpx.get(f"http://127.0.0.1:{served.port}/", timeout=HANG_S).status_code == 200


def test_a_refused_body_that_is_still_being_sent_does_not_lose_the_answer(served: App) -> None:
    answer = httpx.post(
        f"http://127.0.0.1:{served.port}/", content=b"x" * (4 << 20), timeout=HANG_S
    )
    assert answer.status_code == 413
    assert "50000 bytes" in answer.json()["error"]["message"]


def test_silence_is_closed_without_a_word_and_half_a_request_is_told_why(served: App) -> None:
    silent, half, body, trickle = (connect(served) for _ in range(4))
    half.sendall(b"GET / HTTP/1.1\r\nx")
    body.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nxxx")
    trickle.sendall(b"\r\n")
    assert read_all(silent) == b""
    assert [refusal(read_all(late)) for late in (half, body, trickle)] == [
        (408, "request_timeout")
    ] * 3
    for client in (silent, half, body, trickle):
        client.close()


def test_hundreds_of_idle_sockets_cost_a_503_and_then_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with running() as app, ExitStack() as opened, caplog.at_level(logging.ERROR):
        idle = [opened.enter_context(connect(app)) for _ in range(300)]
        ends = [read_all(client) for client in idle]
        told = [end for end in ends if end]
        assert refusal(told[0]) == (503, "server_overloaded") and b"retry-after: " in told[0]
        assert asked(app, b"GET / HTTP/1.0\r\n\r\n").startswith(OK)
    said = [record for record in caplog.records if "connections" in record.message]
    assert 1 <= len(said) < 10 and "QUANTSERVE_MAX_CONNECTIONS" in said[0].message


@pytest.mark.parametrize("path", ["/never-ends", "/long"])
def test_a_client_that_never_reads_is_cut(path: str) -> None:
    with running() as app:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", app.port))
        with client:
            client.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
            assert app.started.wait(HANG_S)
            if path == "/never-ends":
                assert app.ended.wait(HANG_S), "the request goes on for nobody"
            with pytest.raises(ConnectionResetError):
                time.sleep(0.1)
                until(lambda: reset(client))


def reset(client: socket.socket) -> bool:
    fault = client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if fault:
        raise OSError(fault, os.strerror(fault))
    return False


def test_a_client_that_reads_slowly_is_not(served: App) -> None:
    with connect(served) as client:
        client.sendall(b"GET /long HTTP/1.0\r\n\r\n")
        told, end = 0, time.monotonic() + 3 * SMALL.write_s
        while piece := client.recv(1 << 20):
            told += len(piece)
            time.sleep(0.2 if time.monotonic() < end else 0)
        assert told > 10_000_000


def test_pipelined_requests_are_answered_in_turn_and_a_bad_one_ends_them(served: App) -> None:
    good = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nabc"
    told = asked(served, good * 3 + b"GET /" + b"a" * 2000)
    assert told.count(OK) == 3 and not told.count(b"uri_too_long")
    told = asked(served, good + b"GET /" + b"a" * 2000)
    assert told.count(OK) == 1 and told.endswith(b"3\r\n0\r\n\r\n")
    keep = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
    with connect(served) as client:
        client.sendall(keep)
        assert client.recv(1 << 16).startswith(OK)
        client.sendall(b"GET /" + b"a" * 2000)
        assert refusal(read_all(client)) == (414, "uri_too_long")


def test_expect_continue_is_told_to_go_on(served: App) -> None:
    with connect(served) as client:
        client.sendall(b"POST / HTTP/1.0\r\nexpect: 100-continue\r\ncontent-length: 3\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 100 ")
        client.sendall(b"abc")
        assert read_all(client).endswith(b"3\r\n0\r\n\r\n")


UPGRADE = b"connection: upgrade, http2-settings\r\nupgrade: %s\r\nhttp2-settings: AAMAAABk\r\n"


@pytest.mark.parametrize("other", [b"h2c", b"websocket", b"foo/2"], ids=["h2c", "websocket", "foo"])
def test_a_wish_for_another_protocol_is_passed_over_and_the_body_read(
    served: App, other: bytes
) -> None:
    """A WebSocket begins with a GET; clients of HTTP/2 ask for it with their first POST."""
    head = b"POST / HTTP/1.1\r\nhost: x\r\n" + UPGRADE % other
    last = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    for body in (
        [b"content-length: 3\r\n\r\nabc", last],
        [b"content-length: 3\r\n\r\n", b"a", b"bc" + last],
        [b"transfer-encoding: chunked\r\n\r\n1\r\na\r\n", b"2\r\nbc\r\n0\r\n\r\n", last],
    ):
        told = asked(served, head + body[0], *body[1:])
        assert told.count(OK) == 2 and b"\r\n\r\n3" in told.replace(b"\r\n1\r\n3", b"\r\n\r\n3")


def test_a_body_behind_a_websockets_handshake_does_not_keep_a_connection(served: App) -> None:
    head = b"GET / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n" + UPGRADE % b"websocket"
    assert refusal(asked(served, head + b"\r\nxxx")) == (408, "request_timeout")


def test_websockets_pass(served: App) -> None:
    with websockets.sync.client.connect(f"ws://127.0.0.1:{served.port}/") as client:
        assert client.recv(HANG_S) == "hello"


def test_tls_is_bounded_the_same(tmp_path: Path) -> None:
    key, cert = tmp_path / "key", tmp_path / "cert"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj"]
    command += ["/CN=localhost", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.create_default_context(cafile=str(cert))
    with running(ssl_keyfile=str(key), ssl_certfile=str(cert)) as app:
        for request, status in ((b"GET / HTTP/1.0\r\n\r\n", 200), (b"GET /" + b"a" * 2000, 414)):
            with context.wrap_socket(connect(app), server_hostname="localhost") as client:
                client.sendall(request)
                assert int(read_all(client).split()[1]) == status


def test_descriptors_that_ran_out_are_a_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """The loop drops what it cannot accept without a word."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    watch = http_limits.Watch(SMALL)
    watch.say_if_descriptors_are_out()
    assert not caplog.records
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        watch.say_if_descriptors_are_out()
        watch.say_if_descriptors_are_out()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    (said,) = caplog.messages
    assert "dropped: Too many open files" in said


def test_the_soft_limit_of_descriptors_becomes_the_hard_one() -> None:
    code = (
        "import resource as r; from serve import http_limits;"
        "r.setrlimit(r.RLIMIT_NOFILE, (64, r.getrlimit(r.RLIMIT_NOFILE)[1]));"
        "http_limits.raise_descriptors(); print(*r.getrlimit(r.RLIMIT_NOFILE))"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    soft, hard = map(int, told.stdout.split())
    assert soft == hard == resource.getrlimit(resource.RLIMIT_NOFILE)[1]
