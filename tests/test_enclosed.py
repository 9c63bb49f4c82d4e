"""vLLM's own app, with its routes and handlers of exceptions, inside of our gate; no engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from vllm.entrypoints.launchers.app import build_app
from vllm.v1.engine.exceptions import EngineGenerateError

from serve import vllm_compat
from serve.endpoints import enclose
from serve.serving import Serving
from tests.fakes import APP
from tests.test_answer import CHAT, books, fault_of

HI = {"messages": [{"role": "user", "content": "hi"}]}


class Handler:
    """Stands where vLLM's handlers do, which find their faults anywhere."""

    def __init__(self, fault: Exception) -> None:
        self._fault = fault

    async def create_chat_completion(self, *_: Any) -> None:
        raise self._fault

    create_messages = create_chat_completion


@pytest.fixture
def app(serving: Serving) -> FastAPI:
    made: FastAPI = build_app(vllm_compat.parse(["--model", "none"]), ("generate",))
    enclose(made)
    made.state.quantserve = serving
    made.state.server = made.state.engine_client = None
    return made


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=APP) as made:
        yield made


@pytest.mark.parametrize(
    ("fault", "status", "outcome"),
    [
        (RuntimeError("'content'"), 500, "server_error"),
        (KeyError("content"), 500, "server_error"),
        (ValueError(""), 400, "client_error"),
        (TypeError("'NoneType' object is not iterable"), 400, "client_error"),
        (OverflowError("int too large to convert"), 400, "client_error"),
    ],
    ids=lambda given: type(given).__name__ if isinstance(given, Exception) else None,
)
async def test_whatever_a_handler_of_vllms_raises_is_told_and_counted(
    app: FastAPI, client: httpx.AsyncClient, serving: Serving, fault: Exception, status: int,
    outcome: str,
) -> None:  # fmt: skip
    app.state.openai_serving_chat = app.state.anthropic_serving_messages = Handler(fault)
    for path, body in ((CHAT, HI), ("/v1/messages", {**HI, "model": "m", "max_tokens": 1})):
        answer = await client.post(path, json=body, headers={"x-request-id": "mine"})
        assert (answer.status_code, answer.headers["x-request-id"]) == (status, "mine")
        fault_of(path, answer.text)
    assert books(serving) == {("none", outcome): 2}


async def test_an_engine_fault_without_words_has_some(
    app: FastAPI, client: httpx.AsyncClient
) -> None:
    app.state.server, app.state.engine_client = SimpleNamespace(), SimpleNamespace(errored=False)
    app.state.openai_serving_chat = Handler(EngineGenerateError())
    answer = await client.post(CHAT, json=HI)
    assert answer.status_code == 500 and fault_of(CHAT, answer.text)["code"] == "internal_error"


@pytest.mark.parametrize(
    ("sent", "field"),
    [(b"{", None), (b"", None), (b"[]", None), (b"null", None), (b"\xff\xfe", None),
     (b"{}", "messages"),
     (b'{"messages": [], "n": "x"}', "n"), (b'{"messages": 5}', "messages"), (b"[" * 50_000, None)],
)  # fmt: skip
async def test_a_body_that_is_none_is_told_in_one_sentence(
    client: httpx.AsyncClient, sent: bytes, field: str | None
) -> None:
    headers = {"content-type": "application/json"}
    answer = await client.post(CHAT, content=sent, headers=headers)
    fault = fault_of(CHAT, answer.text)
    assert (answer.status_code, fault["param"]) == (400, field)
    assert "\n" not in fault["message"] and len(fault["message"]) < 200


@pytest.mark.parametrize(
    ("path", "field"),
    [(CHAT, "messages"), (CHAT, "structured_outputs"), (CHAT, "tools"),
     ("/v1/completions", "structured_outputs"), ("/v1/responses", "structured_outputs"),
     ("/v1/responses", "tools"), ("/tokenize", "messages")],
)  # fmt: skip
async def test_a_field_of_another_type_is_named(
    client: httpx.AsyncClient, path: str, field: str
) -> None:
    """Also where vLLM's own checks look into it before its type is known."""
    for value in (True, 5, 2.5, "x", [5], {"x": 5}):
        if field == "structured_outputs" or value != {"x": 5}:
            body = {"prompt": "a", "input": "a", **HI, field: value}
            if path != "/v1/completions":  # elsewhere it is another thing
                del body["prompt"]
            answer = await client.post(path, json=body)
            fault = fault_of(path, answer.text)
            assert answer.status_code == 400 and str(fault["param"]).startswith(field), value


async def test_what_is_no_route_no_method_and_no_json_has_the_shape(
    client: httpx.AsyncClient,
) -> None:
    text = {"content-type": "text/plain"}
    answers = [await client.post("/v1/nothing", json={}), await client.put(CHAT, json={}),
               await client.post(CHAT, content=b"x", headers=text)]  # fmt: skip
    assert [answer.status_code for answer in answers] == [404, 405, 400]
    assert [answer.json()["error"]["code"] for answer in answers] == [
        "not_found", "method_not_allowed", "invalid_request"
    ]  # fmt: skip
