"""What a client sees on the socket while no worker is ready."""

from __future__ import annotations

import asyncio
import json
import socket

import httpx
import openai
import pytest

from serve import waiting_room
from serve.errors import SettingsError
from serve.supervisor import bind


async def shut(room: asyncio.Server, listener: socket.socket) -> None:
    room.close()
    await asyncio.sleep(2 * waiting_room.LINGER_S)  # answered connections linger, then close
    listener.close()


async def test_the_official_client_reads_its_error() -> None:
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    room = await waiting_room.open_on(listener)
    client = openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0
    )
    with pytest.raises(openai.InternalServerError) as refusal:
        await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "x" * 100_000}]
        )
    assert refusal.value.status_code == 503 and refusal.value.code == "server_not_ready"
    assert refusal.value.response.headers["retry-after"] == "2"
    await client.close()
    await shut(room, listener)


async def test_alive_but_not_ready() -> None:
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    room = await waiting_room.open_on(listener)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        assert (await client.get("/livez")).status_code == 200
        assert (await client.get("/readyz")).status_code == 503
    assert not await waiting_room.answers("127.0.0.1", port, "/readyz")
    assert await waiting_room.answers("127.0.0.1", port, "/livez")
    await shut(room, listener)


async def test_a_closed_room_leaves_the_socket_to_the_worker() -> None:
    listener = bind("127.0.0.1", 0)
    (await waiting_room.open_on(listener)).close()
    again = await waiting_room.open_on(listener)  # stands for the worker: still listening
    assert await waiting_room.answers("127.0.0.1", listener.getsockname()[1], "/livez")
    await shut(again, listener)


def test_a_taken_port_is_named() -> None:
    first = bind("127.0.0.1", 0)
    port = first.getsockname()[1]
    with pytest.raises(SettingsError, match=f"cannot listen on 127.0.0.1:{port}"):
        bind("127.0.0.1", port)
    first.close()


def test_bodies_are_json() -> None:
    head, _, body = waiting_room.response("/v1/models").partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    assert json.loads(body)["error"]["code"] == "server_not_ready"
