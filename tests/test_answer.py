"""The way out: every request gets an end, in its API's shape, and is counted once, by that end."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anthropic
import httpx
import httpx2
import openai
import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from vllm.exceptions import GenerationError

from serve.answer import Answer
from serve.endpoints import Published, enclose
from serve.errors import EngineDied
from serve.incoming import placing
from serve.serving import Serving
from serve.turn import Turn
from tests.fakes import APP, BY, settled

KEY = APP["authorization"].removeprefix("Bearer ")

CHAT = "/v1/chat/completions"
STREAMS = (CHAT, "/v1/completions", "/v1/responses", "/v1/messages")
FINISHED = {
    "/v1/messages": 'event: message_stop\ndata: {"type": "message_stop"}\n\n',
    "/v1/responses": 'event: response.completed\ndata: {"type": "response.completed"}\n\n',
}
VLLMS = {
    "/v1/messages": 'event: error\ndata: {"type":"error","error":{"type":"internal_error",'
    '"message":"1 validation error for X\\nid\\n  Field required [type=missing, input_type=dict]"}}'
    "\n\n",
}
ERROR = 'data: {"error": {"message": "", "type": "X", "param": null, "code": 500}}\n\n'


def finished(path: str) -> str:
    return FINISHED.get(path, "data: [DONE]\n\n")


class Boom(RuntimeError):
    pass


@pytest.fixture
def app(serving: Serving) -> FastAPI:
    """vLLM's routes as they behave: they generate, and word every fault themselves."""
    made = FastAPI()
    for path in STREAMS:
        made.add_api_route(path, chat, methods=["POST"])
    made.state.quantserve, made.state.published = serving, Published(serving.pool)
    made.state.resume = asyncio.Event()
    made.state.resume.set()

    async def stock(prompt: str, params: object, request_id: str) -> AsyncGenerator[str, None]:
        yield f"{prompt} {params} {request_id}"
        await made.state.resume.wait()
        yield "last"

    made.state.engine = SimpleNamespace(generate=placing(stock, serving, None))
    enclose(made)
    return made


async def chat(request: Request) -> Response:
    """`how` in the body says how the answer ends."""
    body = await request.json()
    how = body.get("how", "whole")
    if how == "raises":
        raise Boom("'content'")
    if how in ("400", "429", "500", "503"):
        fault = {"message": "no", "type": "X", "param": None, "code": int(how)}
        return JSONResponse({"error": fault}, int(how))
    state = request.app.state
    assert body["model"] == "base" or body["model"] in state.published
    chunks = pieces(state, request.url.path, how)
    if body.get("stream"):
        return StreamingResponse(chunks, media_type="text/event-stream")
    whole = [chunk async for chunk in chunks]
    return JSONResponse(whole, 500 if '"error"' in "".join(whole) else 200)


async def pieces(state: Any, path: str, how: str) -> AsyncIterator[str]:
    first = {"nothing": [], "error first": [ERROR]}.get(how)
    last = {"unfinished": [], "error": [VLLMS.get(path, ERROR)]}.get(how, [finished(path)])
    try:
        async for answer in (
            state.engine.generate("", None, "r") if first is None else listed(first)
        ):
            yield f'data: {{"id": "{answer}"}}\n\n' if first is None else answer
            if how == "raises inside":
                raise Boom("in mid-stream")
    except GenerationError:
        yield 'data: {"error": {"message": "in vLLM\'s words", "code": 500}}\n\n'
    for chunk in last if first != [] else ():
        yield chunk
    if how == "raises after":
        raise Boom("when all was sent")


async def listed(chunks: list[str]) -> AsyncIterator[str]:
    for chunk in chunks:
        yield chunk


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=APP) as made:
        yield made


@asynccontextmanager
async def every_slot_held(serving: Serving) -> AsyncIterator[None]:
    async with AsyncExitStack() as held:
        for number in range(serving.pool.slots.count):
            await held.enter_async_context(serving.pool.slots.place(number))
        yield


def books(serving: Serving) -> dict[tuple[str, str], float]:
    """(alias, outcome) -> requests, of what was counted at all."""
    (family,) = serving.metrics.requests.collect()
    return {
        (s.labels["alias"], s.labels["outcome"]): s.value
        for s in family.samples
        if s.name.endswith("_total") and s.value
    }


def errors(serving: Serving) -> dict[tuple[str, str], float]:
    (family,) = serving.metrics.errors.collect()
    return {(s.labels["alias"], s.labels["code"]): s.value for s in family.samples
            if s.name.endswith("_total")}  # fmt: skip


def fault_of(path: str, text: str) -> dict[str, Any]:
    """The error object of an error answer, or of the error event of a stream."""
    line = next((x for x in text.split("\n") if x.startswith("data: ") and '"error"' in x), text)
    body = json.loads(line.removeprefix("data: "))
    if path == "/v1/messages":
        assert body["type"] == "error" and body["request_id"]
        assert set(body["error"]) == {"type", "message"}
    else:
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert isinstance(body["error"]["code"], str)
    fault: dict[str, Any] = body["error"]
    assert fault["message"] and "'" not in fault["message"].replace("request's", "")
    return fault


@pytest.mark.parametrize("stream", [True, False])
async def test_no_slot_is_503_with_the_time_to_come_back_and_the_base_still_answers(
    client: httpx.AsyncClient, serving: Serving, folders: list[Path], *, stream: bool
) -> None:
    await serving.catalog.put("legal", str(folders[0]), BY)
    async with every_slot_held(serving):
        told = {"model": "legal", "stream": stream}
        answer = await client.post(CHAT, json=told)
        base = await client.post(CHAT, json={"model": "base", "stream": stream})
    fault = answer.json()["error"]
    assert (answer.status_code, fault["code"]) == (503, "adapter_slots_full")
    assert answer.headers["retry-after"] == "5"
    assert "in vLLM's words" not in answer.text and "--max-adapters" in fault["message"]
    assert base.status_code == 200
    assert books(serving) == {("legal", "refused"): 1, ("base", "ok"): 1}
    assert errors(serving) == {("legal", "adapter_slots_full"): 1}
    assert (await client.post(CHAT, json=told)).status_code == 200


async def test_a_stream_that_waited_for_its_slot_comes_whole(
    client: httpx.AsyncClient, serving: Serving, folders: list[Path]
) -> None:
    await serving.catalog.put("legal", str(folders[0]), BY)
    async with every_slot_held(serving):
        asked = asyncio.create_task(client.post(CHAT, json={"model": "legal", "stream": True}))
        while not serving.pool.slots.waiting:  # noqa: ASYNC110 - the slots have no event for it
            await asyncio.sleep(0.01)
        assert not asked.done()
    answer = await asked
    assert answer.status_code == 200 and answer.text.endswith("data: [DONE]\n\n")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert serving.metrics.ttft.labels("legal")._sum.get() > 0
    await settled()
    route = serving.pool.get("legal")
    assert route is not None and route.stable.leases == 0


@pytest.mark.parametrize("path", STREAMS)
@pytest.mark.parametrize(
    ("how", "status", "outcome"),
    [
        ("whole", 200, "ok"),
        ("400", 400, "client_error"),
        ("429", 429, "refused"),
        ("500", 500, "server_error"),
        ("503", 503, "refused"),
        ("raises", 500, "server_error"),
        ("error first", 500, "server_error"),
        ("error", 200, "stream_error"),
        ("raises inside", 200, "stream_error"),
        ("unfinished", 200, "stream_error"),
        ("nothing", 500, "server_error"),
        ("raises after", 200, "ok"),
    ],
)
async def test_a_stream_is_counted_once_by_its_end_and_a_failure_is_told(
    client: httpx.AsyncClient, serving: Serving, path: str, how: str, status: int, outcome: str
) -> None:
    told = {"model": "base", "stream": True, "how": how}
    answer = await client.post(path, json=told, headers={"x-request-id": "mine"})
    counted = books(serving)
    assert answer.status_code == status and answer.headers["x-request-id"] == "mine"
    assert {end for _, end in counted} == {outcome} and list(counted.values()) == [1]
    assert ("retry-after" in answer.headers) == (status in (429, 503))
    if outcome == "ok":
        assert answer.text.endswith(finished(path)) and not errors(serving)
        return
    fault = fault_of(path, answer.text)
    assert sum(errors(serving).values()) == 1
    if outcome in ("server_error", "stream_error"):
        assert fault["type"] == ("api_error" if path == "/v1/messages" else "server_error")
        assert "internal_error" in next(iter(errors(serving)))
        assert "request" in fault["message"] or fault["message"] == "no"


@pytest.mark.parametrize("how", ["whole", "400", "503", "raises"])
async def test_a_plain_answer_is_counted_once_by_its_end(
    client: httpx.AsyncClient, serving: Serving, how: str
) -> None:
    answer = await client.post(CHAT, json={"model": "base", "how": how})
    outcome = {"whole": "ok", "400": "client_error", "503": "refused"}.get(how, "server_error")
    assert [end for _, end in books(serving)] == [outcome] and sum(books(serving).values()) == 1
    assert answer.headers["x-request-id"]
    if how != "whole":
        assert fault_of(CHAT, answer.text)["code"]


async def test_what_nobody_handles_is_logged_once_with_its_traceback_and_id(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        answer = await client.post(CHAT, json={"how": "raises"}, headers={"x-request-id": "mine"})
    assert fault_of(CHAT, answer.text)["code"] == "internal_error"
    (record,) = [r for r in caplog.records if r.exc_info]
    assert "mine" in record.getMessage() and record.exc_info and record.exc_info[0] is Boom


async def test_a_body_that_does_not_fit_names_its_field(
    app: FastAPI, client: httpx.AsyncClient
) -> None:
    async def ask(body: dict[str, int]) -> dict[str, int]:
        return body

    app.add_api_route("/v1/embeddings", ask, methods=["POST"])
    answer = await client.post("/v1/embeddings", json={"n": "many"})
    fault = fault_of("/v1/embeddings", answer.text)
    assert (answer.status_code, fault["param"], fault["code"]) == (400, "n", "invalid_request")


async def test_an_engine_that_has_ended_asks_for_the_request_again_and_is_a_failure_of_ours(
    client: httpx.AsyncClient, serving: Serving
) -> None:
    looks = itertools.count()
    serving.engine_dead = lambda: next(looks) > 0  # it dies under the request
    plain = await client.post(CHAT, json={"model": "base", "how": "500"})
    assert plain.status_code == 503 and int(plain.headers["retry-after"]) > 0
    assert plain.json()["error"]["code"] == "engine_died"
    looks = itertools.count()
    stream = await client.post(CHAT, json={"model": "base", "stream": True, "how": "error"})
    assert fault_of(CHAT, stream.text)["code"] == "engine_died"
    assert books(serving) == {("none", "server_error"): 1, ("base", "stream_error"): 1}


async def test_behind_a_prefix_a_route_keeps_its_shape(app: FastAPI, serving: Serving) -> None:
    app.root_path = "/llm"
    told = {"model": "base", "stream": True, "how": "unfinished"}
    transport = httpx.ASGITransport(app)
    ops = {"authorization": "Bearer sk-ops-0123456789"}
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.post("/llm/v1/messages", json=told, headers=ops)
    assert fault_of("/v1/messages", answer.text)["type"] == "api_error"


@pytest.mark.parametrize("how", ["error", "raises inside"])
async def test_official_clients_raise_what_a_stream_ends_with(app: FastAPI, how: str) -> None:
    asked: Any = {"model": "base", "stream": True, "extra_body": {"how": how}}
    hi: Any = [{"role": "user", "content": "hi"}]
    transport = httpx2.ASGITransport(app)
    async with openai.AsyncOpenAI(
        base_url="http://test/v1", api_key=KEY, max_retries=0,
        http_client=openai.DefaultAsyncHttpxClient(transport=transport),
    ) as client:  # fmt: skip
        with pytest.raises(openai.APIError) as chat_fault:
            await read(await client.chat.completions.create(messages=hi, **asked))
        with pytest.raises(openai.APIError) as response_fault:
            await read(await client.responses.create(input="hi", **asked))
    async with anthropic.AsyncAnthropic(
        base_url="http://test", auth_token=KEY, max_retries=0,
        http_client=anthropic.DefaultAsyncHttpxClient(transport=transport),
    ) as other:  # fmt: skip
        with pytest.raises(anthropic.APIStatusError) as message_fault:
            await read(await other.messages.create(messages=hi, max_tokens=4, **asked))
    told: list[Any] = [fault.value.body for fault in (chat_fault, response_fault, message_fault)]
    assert [body.get("code") for body in told] == ["internal_error", "internal_error", None]
    assert told[2]["error"]["type"] == "api_error" and told[2]["error"]["message"]


async def read(stream: AsyncIterator[Any]) -> None:
    async for _ in stream:
        pass


class Caller:
    """A client at the ASGI interface, which can leave; `sent` is what it was sent."""

    def __init__(self, app: FastAPI, path: str, body: dict[str, Any]) -> None:
        self.sent: list[dict[str, Any]] = []
        self._app, self._path, self._body = app, path, json.dumps(body).encode()
        self._left, self._asked, self.breaks = asyncio.Event(), False, False
        self.got = asyncio.Event()  # something

    def leave(self) -> None:
        self._left.set()

    async def _receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": self._body}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if self.breaks:
            raise OSError("broken pipe")
        self.sent.append(dict(message))
        self.got.set()

    def ask(self, spec: str = "2.3") -> asyncio.Task[None]:
        headers = [(name.encode(), value.encode()) for name, value in APP.items()]
        headers.append((b"content-type", b"application/json"))
        scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": spec},
                 "http_version": "1.1", "method": "POST", "scheme": "http", "path": self._path,
                 "raw_path": b"", "query_string": b"", "root_path": "", "headers": headers,
                 "client": ("test", 1), "server": ("test", 80), "state": {}}  # fmt: skip
        return asyncio.ensure_future(self._app(scope, self._receive, self._send))

    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()


@pytest.mark.parametrize("path", STREAMS)
async def test_a_client_that_leaves_a_stream_is_gone_not_ok(
    app: FastAPI, serving: Serving, path: str
) -> None:
    app.state.resume.clear()
    caller = Caller(app, path, {"model": "base", "stream": True})
    task = caller.ask()
    await caller.got.wait()
    caller.leave()
    await task
    assert books(serving) == {("base", "client_gone"): 1} and not errors(serving)


async def test_a_client_that_leaves_a_plain_request_is_gone_whatever_is_made_for_it(
    app: FastAPI, serving: Serving
) -> None:
    async def cancelled(request: Request) -> Response:  # as vLLM's routes do when a client leaves
        while (await request.receive())["type"] != "http.disconnect":
            pass
        return JSONResponse(None)

    app.add_api_route("/pooling", cancelled, methods=["POST"])
    caller = Caller(app, "/pooling", {})
    task = caller.ask()
    caller.leave()
    await task
    assert books(serving) == {("none", "client_gone"): 1}


async def test_a_client_whose_connection_breaks_is_gone_and_no_fault_of_ours(
    app: FastAPI, serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    app.state.resume.clear()
    caller = Caller(app, CHAT, {"model": "base", "stream": True})
    task = caller.ask(spec="2.4")  # servers of this version raise in `send`
    await caller.got.wait()
    caller.breaks = True
    app.state.resume.set()
    await task
    assert books(serving) == {("base", "client_gone"): 1} and not caplog.records


@pytest.mark.parametrize("how", ["whole", "error"])
async def test_a_client_that_leaves_at_the_last_event_has_had_its_answer(
    app: FastAPI, serving: Serving, how: str
) -> None:
    """The official clients close the connection there, or at the error."""
    caller = Caller(app, CHAT, {"model": "base", "stream": True, "how": how})

    async def send(message: Any) -> None:
        await Caller._send(caller, message)
        if b"[DONE]" in message.get("body", b"") or b"error" in message.get("body", b""):
            caller.leave()
            await settled()

    caller._send = send  # type: ignore[method-assign]
    await caller.ask()
    assert books(serving) == {("base", "ok" if how == "whole" else "stream_error"): 1}


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_that_the_server_gives_up_is_told_so(
    app: FastAPI, serving: Serving, *, stream: bool
) -> None:
    app.state.resume.clear()
    caller = Caller(app, CHAT, {"model": "base", "stream": stream})
    task = caller.ask()
    while serving.metrics.in_flight._value.get() < 1 or (stream and not caller.sent):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    task.cancel()
    await task
    assert fault_of(CHAT, caller.text())["code"] == "server_draining"
    assert caller.sent[0]["status"] == (200 if stream else 503)
    assert not caller.sent[-1].get("more_body")
    ((_, outcome),) = books(serving)
    assert outcome == ("stream_error" if stream else "refused")


@pytest.mark.parametrize("when", ["before", "within"])
async def test_an_open_answer_can_be_ended_from_outside(
    app: FastAPI, serving: Serving, when: str
) -> None:
    caller = Caller(app, CHAT, {})
    made = Answer(serving, Turn(), CHAT, caller._send)
    made.counted = True
    if when == "within":
        start = {"type": "http.response.start", "status": 200,
                 "headers": [(b"content-type", b"text/event-stream")]}  # fmt: skip
        await made.send(start)
        await made.send({"type": "http.response.body", "body": b'data: {"id": 1}\n\n',
                         "more_body": True})  # fmt: skip
    await made.end(EngineDied("it ended"))
    await made.send({"type": "http.response.body", "body": b"late", "more_body": True})
    assert "late" not in caller.text()
    assert fault_of(CHAT, caller.text())["message"] == "it ended"
    assert not caller.sent[-1].get("more_body")
    outcome = "server_error" if when == "before" else "stream_error"
    assert books(serving) == {("none", outcome): 1}


async def test_an_alias_that_is_gone_does_not_come_back_with_its_last_stream(
    app: FastAPI, serving: Serving, folders: list[Path]
) -> None:
    await serving.catalog.put("legal", str(folders[0]), BY)
    app.state.resume.clear()
    caller = Caller(app, CHAT, {"model": "legal", "stream": True})
    task = caller.ask()
    await caller.got.wait()
    serving.metrics.count_tokens("legal", 3, 4)
    await serving.catalog.delete("legal", BY)
    app.state.resume.set()
    await task
    serving.metrics.count_tokens("legal", 0, 5)
    assert books(serving) == {("gone", "ok"): 1}
    for family, total in (
        (serving.metrics.prompt_tokens, 3),
        (serving.metrics.generation_tokens, 9),
    ):
        (found,) = family.collect()
        assert {s.labels["alias"]: s.value for s in found.samples if "total" in s.name} == {
            "gone": total
        }
