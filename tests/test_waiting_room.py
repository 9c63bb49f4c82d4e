"""What a client sees on the socket while no worker accepts, and what it stands."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator

import httpx
import openai
import pytest

from serve import waiting_room
from serve.errors import Draining, Forbidden
from serve.listening import bind
from serve.waiting_room import WaitingRoom


def metrics(authorization: str | None) -> bytes:
    if authorization != "Bearer seen":
        raise Forbidden("no")
    return b"quantserve_ready 0.0\n"


@pytest.fixture
async def room() -> AsyncIterator[WaitingRoom]:
    listener = bind("127.0.0.1", 0)
    made = WaitingRoom(listener, metrics, root_path="/llm/")
    await made.open()
    yield made
    await made.clear()
    listener.close()


@pytest.fixture
def port(room: WaitingRoom) -> int:
    found: int = room._listener.getsockname()[1]
    return found


@pytest.fixture
async def client(port: int) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as made:
        yield made


async def spoken(port: int, said: bytes) -> bytes:
    """What is answered to these bytes, until the connection is closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(said)
    writer.write_eof()
    answer = await asyncio.wait_for(reader.read(), 60)
    writer.close()
    return answer


async def test_the_official_client_reads_its_error(port: int) -> None:
    client = openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0
    )
    with pytest.raises(openai.InternalServerError) as refusal:
        await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "x" * 5_000_000}]
        )
    assert refusal.value.status_code == 503 and refusal.value.code == "server_not_ready"
    assert refusal.value.response.headers["retry-after"] == "2"
    await client.close()


@pytest.mark.parametrize(
    ("path", "status"),
    [("/livez", 200), ("/livez/", 200), ("//livez", 200), ("/livez?x=1", 200), ("/llm/livez", 200),
     ("/readyz", 503), ("/health", 503), ("/v1/models", 503), ("/livezz", 503), ("/", 503)],
)  # fmt: skip
async def test_alive_but_not_ready(
    client: httpx.AsyncClient, port: int, path: str, status: int
) -> None:
    path = f"http://127.0.0.1:{port}{path}"
    reply = await client.get(path)
    assert reply.status_code == status and reply.json()
    head = await client.head(path)
    assert head.status_code == status and not head.content
    assert head.headers["content-length"] == reply.headers["content-length"]


async def test_it_says_why(room: WaitingRoom, client: httpx.AsyncClient) -> None:
    room.fault = Draining("going away")
    reply = await client.post("/v1/completions", json={})
    assert reply.json()["error"]["code"] == "server_draining"
    assert reply.headers["retry-after"] == "5"


async def test_metrics_are_for_whoever_may_see_them(client: httpx.AsyncClient) -> None:
    seen = await client.get("/metrics", headers={"AUTHORIZATION": "Bearer seen"})
    assert seen.status_code == 200 and seen.text == "quantserve_ready 0.0\n"
    assert (await client.get("/metrics")).status_code == 403


@pytest.mark.parametrize(
    "garbage",
    [b"GARBAGE\r\n\r\n", b"\x16\x03\x01\x00\r\n\r\n", b"\r\n\r\n", b" \r\n\r\n", b"GET /\r\n\r\n",
     b"GET  HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\n", b"\xff" * 100 + b"\r\n\r\n"],
)  # fmt: skip
async def test_garbage_is_refused_and_closed_on(
    port: int, garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    assert (await spoken(port, garbage)).startswith(b"HTTP/1.1 400 ")
    assert not caplog.records


@pytest.mark.parametrize("said", [b"", b"GET /livez HTTP/1.1\r\nX: ", b"GET /" + b"a" * 200_000])
async def test_what_is_no_whole_head_is_closed_on(
    port: int, said: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    assert await spoken(port, said) == b""
    assert not caplog.records


async def test_who_says_nothing_is_sent_away(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting_room, "HEAD_TIMEOUT_S", 0.05)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    assert await asyncio.wait_for(reader.read(), 60) == b""
    writer.close()


async def test_a_probe_finds_a_place_among_any_number_of_idle_connections(
    port: int, client: httpx.AsyncClient
) -> None:
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(waiting_room.PLACES + 50)]
    assert (await client.get("/livez")).status_code == 200
    for connection in idle:
        connection.close()


async def test_a_closed_room_leaves_the_socket_to_the_worker(
    room: WaitingRoom, port: int, client: httpx.AsyncClient
) -> None:
    room.close()
    assert not room.is_open
    worker = WaitingRoom(room._listener, metrics)  # stands for it: still listening
    await worker.open()
    assert (await client.get("/livez")).status_code == 200
    await worker.clear()


async def test_it_opens_again_and_twice_is_once(
    room: WaitingRoom, client: httpx.AsyncClient
) -> None:
    room.close()
    await room.open()
    await room.open()
    assert (await client.get("/livez")).status_code == 200


@pytest.mark.parametrize(
    "line",
    ["GET http://a:1/livez", "GET HTTP://a/llm/livez?x", "GET /%6civez", "\r\n\r\nGET //livez/"],
)
def test_an_address_means_here_what_it_means_to_a_worker(line: str) -> None:
    asked = waiting_room.parse(f"{line} HTTP/1.1\r\nhost: a\r\n\r\n".encode(), "/llm")
    assert asked is not None and asked.path == "/livez"


def test_bodies_are_json() -> None:
    head, _, body = waiting_room.http(Draining("away"), "/v1/models").partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    assert json.loads(body)["error"]["code"] == "server_draining"


async def test_anthropics_clients_are_told_in_their_own_shape(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/messages", json={})
    told = answer.json()
    assert (told["type"], told["error"]["type"]) == ("error", "overloaded_error")
    assert told["request_id"] == answer.headers["x-request-id"]
