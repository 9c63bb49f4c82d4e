"""The worst that a stranger or a client sends: refused in words, while neighbours are served."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.e2e.server import APP_KEY, START_TIMEOUT_S, Server

pytestmark = pytest.mark.e2e

logger = logging.getLogger(__name__)
HANG_S = 300.0
HI = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def app(server: Server) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {APP_KEY}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=START_TIMEOUT_S) as client:
        yield client


class Neighbour(threading.Thread):
    """Asks the same again and again until told to stop, and keeps status and seconds of each."""

    def __init__(self, server: Server, method: str, path: str, body: Any = None) -> None:
        super().__init__()
        self._server, self._asks, self._body = server, (method, path), body
        self.over = threading.Event()
        self.told: list[tuple[int, float]] = []

    def run(self) -> None:
        with self._server.http() as client:
            while not self.told or not self.over.wait(0.05):
                began = time.monotonic()
                answer = client.request(*self._asks, json=self._body, timeout=HANG_S)
                self.told.append((answer.status_code, time.monotonic() - began))


@pytest.fixture
def neighbours(server: Server) -> Iterator[None]:
    """Around a test: whoever asks for life or for an answer meanwhile gets it."""
    body = {"model": "first", "prompt": "Once", "max_tokens": 4}
    both = [Neighbour(server, "GET", "/livez"), Neighbour(server, "POST", "/v1/completions", body)]
    for one in both:
        one.start()
    yield
    for one in both:
        one.over.set()
        one.join(2 * HANG_S)
        assert {status for status, _ in one.told} == {200}, one.told
        slowest = max(took for _, took in one.told)
        logger.info("slowest of %d: %.2f s", len(one.told), slowest)  # the machine's figure, too


@contextmanager
def connected(server: Server) -> Iterator[socket.socket]:
    where = urlsplit(server.url)
    assert where.hostname and where.port
    with socket.create_connection((where.hostname, where.port), HANG_S) as client:
        yield client


def flooded(server: Server, start: bytes, piece: bytes, most: int) -> bytes:
    """What a client reads that sends `start`, then `piece` until nobody takes it any more."""
    with connected(server) as client:
        client.sendall(start)
        sent = 0
        try:
            while sent < most:
                sent += client.send(piece)
        except OSError:
            return b""  # closed on it meanwhile; others read the answer
        return client.recv(1 << 16)


def fault_of(answer: httpx.Response) -> dict[str, Any]:
    fault: dict[str, Any] = answer.json()["error"]
    assert set(fault) == {"message", "type", "param", "code"}
    assert isinstance(fault["code"], str) and fault["message"] and len(fault["message"]) < 1000
    assert answer.headers["x-request-id"]
    return fault


@pytest.mark.usefixtures("neighbours")
def test_floods_without_a_key_are_refused(server: Server) -> None:
    for start, piece, status in (
        (b"GET /", b"a" * 65536, b"414"),
        (b"GET / HTTP/1.1\r\n", b"x: " + b"y" * 8000 + b"\r\n", b"431"),
        (b"GET / HTTP/1.1\r\nx: ", b"y" * 65536, b"431"),
        (b"", b"\r\n" * 30_000, b"431"),
    ):
        told = flooded(server, start, piece, 64 << 20)
        assert not told or told.startswith(b"HTTP/1.1 " + status)
        with connected(server) as client:
            client.sendall(start + piece * 10 + b"\r\nx")
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 " + status)
    answer = httpx.post(f"{server.url}/v1/completions", content=b"x" * (64 << 20), timeout=HANG_S)
    assert answer.status_code == 413 and fault_of(answer)["code"] == "request_too_large"


@pytest.mark.usefixtures("neighbours")
def test_hundreds_of_idle_and_half_open_sockets_are_closed(server: Server) -> None:
    with ExitStack() as opened:
        clients = [opened.enter_context(connected(server)) for _ in range(300)]
        for client in clients[::2]:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nX-")
        for client in clients:
            while client.recv(1 << 16):
                pass


def test_a_client_that_never_reads_is_cut_and_its_version_is_free(
    server: Server, api: httpx.Client
) -> None:
    body = {"model": "first", "prompt": ["Once"] * 16, "n": 8, "max_tokens": 2000, "stream": True,
            "ignore_eos": True, "logprobs": 5, "temperature": 1.0}  # fmt: skip
    raw = json.dumps(body).encode()
    where = urlsplit(server.url)
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    with client:
        client.connect((where.hostname, where.port))
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {APP_KEY}\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
        client.sendall(head.encode() + raw)
        until(lambda: requests_of(api, "first") > 0)
        until(lambda: requests_of(api, "first") == 0)


def requests_of(api: httpx.Client, alias: str) -> int:
    listed = api.get("/admin/adapters").json()["data"]
    return sum(one["requests"] for one in listed if one["alias"] == alias)


def until(true: Any) -> None:
    end = time.monotonic() + 2 * HANG_S
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


TOO_MUCH: list[tuple[str, dict[str, Any], str | None]] = [
    ("/v1/completions", {"prompt": list(range(1_000_000))}, None),
    ("/v1/chat/completions", {"messages": [HI] * 100_000}, None),
    ("/v1/chat/completions", {"messages": [HI] * 5000}, "messages"),
    ("/v1/messages", {"messages": [HI] * 5000, "max_tokens": 4}, "messages"),
    ("/v1/chat/completions/batch", {"messages": [[HI]] * 3000}, "messages"),
    ("/v1/responses", {"input": [HI] * 5000}, "input"),
    ("/tokenize", {"messages": [HI] * 5000}, "messages"),
    ("/v1/completions", {"prompt": "a", "n": 16384}, "n"),
    ("/v1/chat/completions", {"messages": [HI], "n": 129}, "n"),
    ("/v1/completions", {"prompt": "a", "top_k": 10**20}, "top_k"),
    ("/v1/completions", {"prompt": "a", "stop": "\ud800"}, None),
    ("/v1/completions", {"prompt": "a", "stop": "x" * 5000}, "stop"),
    ("/v1/completions", {"prompt": "a", "logprobs": 10**6}, "logprobs"),
    ("/v1/messages", {"messages": [HI], "max_tokens": 4, "model": "m" * 2_200_000}, "model"),
    ("/v1/chat/completions", {"messages": [HI], "model": "m" * 2_200_000}, "model"),
    ("/v1/messages/count_tokens", {"messages": [HI], "model": "m" * 2_200_000}, "model"),
]  # fmt: skip
GRAMMARS: list[dict[str, Any]] = [
    {"choice": [f"{i:040}" for i in range(60_000)]},
    {"regex": "a?" * 2048},
    {"regex": "\\w+ " * 1024},
    {"grammar": 'root ::= "a"\nroot ::= "b"'},
    {"grammar": "root ::= " + '[^"]? ' * 2000},
    {"json": {"type": "object", "properties": {
        f"p{i}": {"type": "string", "maxLength": 100 + i} for i in range(200)}}},
]  # fmt: skip


@pytest.mark.usefixtures("neighbours")
@pytest.mark.parametrize("path", dict.fromkeys(path for path, _, _ in TOO_MUCH))
def test_what_is_too_much_is_a_400_that_names_the_field(app: httpx.Client, path: str) -> None:
    for asked, body, param in TOO_MUCH:
        if asked == path:
            answer = app.post(path, content=json.dumps({"model": "first", **body}),
                              headers={"content-type": "application/json"})  # fmt: skip
            assert answer.status_code == 400, (body.keys(), answer.text[:300])
            if "messages" not in path.split("/"):  # Anthropic's shape is another
                assert fault_of(answer)["param"] == param


@pytest.mark.usefixtures("neighbours")
@pytest.mark.parametrize("stream", [False, True])
def test_grammars_that_never_end_or_are_none_are_a_400(app: httpx.Client, *, stream: bool) -> None:
    """Streamed or not: the second time from memory."""
    for wanted in GRAMMARS:
        body = {"model": "first", "messages": [HI], "stream": stream, "max_tokens": 4}
        answer = app.post("/v1/chat/completions", json={**body, "structured_outputs": wanted})
        assert answer.status_code == 400, (str(wanted)[:80], answer.text[:300])
        assert fault_of(answer)["param"] in (*wanted, "json_schema")


def test_a_schema_that_only_refers_to_itself_is_a_400(app: httpx.Client) -> None:
    for schema in ({"$ref": "#"}, {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        body = {"model": "first", "messages": [HI], "max_tokens": 4, "response_format": form}
        answer = app.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400 and "nothing fits it" in fault_of(answer)["message"]


def test_what_people_send_still_works(app: httpx.Client, server: Server) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {
        "type": "object", "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"]}}}  # fmt: skip
    body = {"model": "first", "messages": [HI], "max_tokens": 60, "response_format": form}
    assert app.post("/v1/chat/completions", json=body).status_code == 200
    asked = {"model": "first", "messages": [HI], "max_tokens": 4}
    key = {"x-api-key": APP_KEY}
    assert httpx.post(
        f"{server.url}/v1/messages", json=asked, headers=key, timeout=HANG_S
    ).is_success
    assert (
        httpx.post(
            f"{server.url}/v1/chat/completions", json=asked, headers=key, timeout=HANG_S
        ).status_code
        == 401
    )


ALIASED = [
    ("/v1/completions", {"prompt": "Once"}),
    ("/v1/chat/completions", {"messages": [HI]}),
    ("/v1/chat/completions/batch", {"messages": [[HI]]}),
    ("/v1/responses", {"input": "hi", "max_output_tokens": 16}),
    ("/v1/messages", {"messages": [HI]}),
    ("/v1/messages/count_tokens", {"messages": [HI]}),
    ("/tokenize", {"prompt": "hi"}),
]


@pytest.mark.parametrize(("path", "body"), ALIASED)
def test_every_open_route_honours_an_alias_and_knows_no_other_name(
    app: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    limits = {} if "max_output_tokens" in body or "token" in path else {"max_tokens": 4}
    answer = app.post(path, json={"model": "first", **limits, **body})
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-quantserve-adapter"].startswith("first@")
    assert app.post(path, json={"model": "ghost", **limits, **body}).status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "/invocations", "/v1/systemone", "/generative_scoring", "/inference/v1/generate",
        "/v1/chat/completions/render",
    ],
)  # fmt: skip
def test_a_route_that_is_shut_is_not_there(api: httpx.Client, path: str) -> None:
    answer = api.post(path, json={"model": "first", "messages": [HI]})
    assert answer.status_code == 404 and fault_of(answer)["code"] == "not_found"


def test_metrics_have_no_back_door(server: Server) -> None:
    headers = {"access-control-request-method": "GET"}
    for path in ("/metrics", "/metrics/anything"):
        told = httpx.request("OPTIONS", f"{server.url}{path}", headers=headers, timeout=HANG_S)
        assert told.status_code == 401
