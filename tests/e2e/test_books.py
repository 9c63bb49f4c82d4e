"""What is counted after a storm of requests, and what official clients read of errors."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.e2e.server import APP_KEY, Server

pytestmark = pytest.mark.e2e

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ASK = {"messages": [{"role": "user", "content": "Name three colours."}], "max_tokens": 8}
LONG = ASK | {"max_tokens": 2000, "ignore_eos": True}
SAMPLE = re.compile(r"^([\w:]+)(?:\{(.*)\})? ([-+.\deE]+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="([^"]*)"')

Books = dict[tuple[str, ...], float]


def books(api: httpx.Client) -> Books:
    """Every counter of requests and tokens, ours and vLLM's: (name, label values) -> value."""
    found: Books = {}
    for name, labels, value in SAMPLE.findall(api.get("/metrics").text):
        if name.endswith(("_tokens_total", "quantserve_requests_total", "_requests_in_flight")):
            kept = [text for label, text in LABEL.findall(labels) if label in ("alias", "outcome")]
            found[name, *kept] = float(value)
    return found


def settled(api: httpx.Client) -> Books:
    """Once nothing runs and nothing moves any more: an abort takes the engine a step."""
    end, last = time.monotonic() + 120, books(api)
    while time.monotonic() < end:
        time.sleep(0.5)
        now = books(api)
        if now == last and not now["quantserve_requests_in_flight",]:
            return now
        last = now
    raise AssertionError("the counters do not come to rest")


def total(counted: Books, name: str) -> float:
    return sum(value for key, value in counted.items() if key[0] == name)


def assert_sums_are_vllms(counted: Books) -> None:
    for kind in ("prompt", "generation"):
        ours = total(counted, f"quantserve_{kind}_tokens_total")
        assert ours == total(counted, f"vllm:{kind}_tokens_total"), kind


def whole(api: httpx.Client, path: str, **body: Any) -> str:
    """Read the whole answer; ok, or by its status."""
    status = api.post(path, json=body).status_code
    return "ok" if status < 400 else "client_error"


def left(api: httpx.Client, path: str, **body: Any) -> str:
    """A stream that is left at its first event."""
    with api.stream("POST", path, json=body | {"stream": True}) as answer:
        assert answer.status_code == 200
        next(answer.iter_lines())
    return "client_gone"


def given_up(api: httpx.Client, path: str, **body: Any) -> str:
    """A plain request whose client does not wait for the answer."""
    with pytest.raises(httpx.ReadTimeout):
        api.post(path, json=body, timeout=2)
    return "client_gone"


Request = tuple[Callable[..., str], str, dict[str, Any]]


def requests_of(model: dict[str, str]) -> list[Request]:
    """Of each kind one, for whoever `model` names."""
    many = {"prompt": ["a", "b c", "d e f"], "max_tokens": 5}
    return [
        (whole, CHAT, ASK),
        (whole, CHAT, ASK | {"stream": True}),
        (whole, CHAT, ASK | {"n": 3, "temperature": 1}),
        (whole, CHAT, ASK | {"n": 2, "temperature": 1, "stream": True}),
        (whole, COMPLETIONS, many),
        (whole, COMPLETIONS, {"prompt": "a", "max_tokens": 4, "use_beam_search": True, "n": 2}),
        (whole, "/v1/responses", {"input": "hi", "max_output_tokens": 4, "stream": True}),
        (whole, CHAT, ASK | {"temperature": -1}),
        (left, CHAT, LONG),
        (left, CHAT, LONG | {"n": 2, "temperature": 1}),
        (left, COMPLETIONS, {"prompt": ["a", "b"], "max_tokens": 500, "ignore_eos": True}),
        (given_up, CHAT, LONG),
    ] + ([(whole, "/v1/messages", ASK)] if model else [])  # fmt: skip


def test_after_a_storm_the_sums_are_vllms_and_every_request_is_counted_once(
    api: httpx.Client, loras: list[Path]
) -> None:
    api.put("/admin/adapters/brief", json={"source": str(loras[1])}).raise_for_status()
    before = settled(api)
    assert_sums_are_vllms(before)
    named = {"base": {"model": "base"}, "first": {"model": "first"}, "": {}}
    asked = [
        (alias or "base", call, path, {**body, **model})
        for alias, model in named.items()
        for call, path, body in requests_of(model)
    ]
    lost: list[dict[str, Any]] = [ASK | {"model": "nobody"}, {"messages": 5}]
    asked += [("none", whole, CHAT, body) for body in lost]
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(call, api, path, **body) for _, call, path, body in asked]
        outcomes = [one.result() for one in running]
    after = settled(api)
    assert_sums_are_vllms(after)
    name = "quantserve_requests_total"
    moved = {key[1:]: after[key] - before.get(key, 0) for key in after if key[0] == name}
    counted = {key: value for key, value in moved.items() if value}
    told = [alias for alias, *_ in asked]
    assert counted == Counter(zip(told, outcomes, strict=True))
    for alias in ("base", "first"):
        assert after["quantserve_generation_tokens_total", alias] > 0
    gone_with_its_stream(api, after)


def gone_with_its_stream(api: httpx.Client, before: Books) -> None:
    """An alias deleted under a stream: its series leave, and its tokens stay in the sums."""
    body = ASK | {"model": "brief", "stream": True, "max_tokens": 60, "ignore_eos": True}
    with api.stream("POST", CHAT, json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        api.delete("/admin/adapters/brief").raise_for_status()
        rest = list(lines)
    assert "data: [DONE]" in rest
    after = settled(api)
    assert_sums_are_vllms(after)
    assert not [key for key in after if "brief" in key]
    key = ("quantserve_generation_tokens_total", "gone")
    assert after[key] - before.get(key, 0) == 60
    assert after["quantserve_requests_total", "gone", "ok"] >= 1


def test_adapters_are_shown_to_routers_by_the_names_that_clients_ask_for(
    api: httpx.Client, loras: list[Path]
) -> None:
    """A swap adds no series, and the digest of a version is nobody's business."""

    def shown() -> list[str]:
        return re.findall(
            r"^vllm:lora_requests_info\{(.*)\}", api.get("/metrics").text, re.MULTILINE
        )

    for folder in loras:
        api.put("/admin/adapters/swapped", json={"source": str(folder)}).raise_for_status()
        with api.stream("POST", CHAT, json=LONG | {"model": "swapped", "stream": True}) as answer:
            next(answer.iter_lines())
            (series,) = shown()
            assert dict(LABEL.findall(series))["running_lora_adapters"] == "swapped"
    api.delete("/admin/adapters/swapped").raise_for_status()
    assert len(shown()) == 1


def test_anthropics_client_reads_its_own_errors(server: Server) -> None:
    hi: Any = [{"role": "user", "content": "hi"}]

    def fault(kind: type[anthropic.APIStatusError], key: str, **asked: Any) -> Any:
        with (
            anthropic.Anthropic(base_url=server.url, auth_token=key, max_retries=0) as client,
            pytest.raises(kind) as caught,
        ):
            client.messages.create(max_tokens=4, **asked)
        told: Any = caught.value.body
        assert caught.value.request_id == told["request_id"]
        return told["error"]["type"]

    assert fault(anthropic.NotFoundError, APP_KEY, model="nobody", messages=hi) == "not_found_error"
    kind = fault(anthropic.BadRequestError, APP_KEY, model="base", messages=[])
    assert kind == "invalid_request_error"
    kind = fault(anthropic.AuthenticationError, "sk-wrong", model="base", messages=hi)
    assert kind == "authentication_error"


def test_openais_client_reads_which_field_is_wrong(server: Server) -> None:
    nothing: Any = [{"role": "user", "content": None}]
    with server.client(APP_KEY) as client, pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="base", messages=nothing)
    assert bad.value.param == "messages[0].content" and bad.value.code == "invalid_request"
    assert "{'" not in bad.value.message and "validation error" not in bad.value.message


def test_one_id_is_the_clients_the_logs_and_vllms(server: Server, api: httpx.Client) -> None:
    headers = {"x-request-id": "books-4711"}
    answer = api.post(CHAT, json=ASK | {"model": "base"}, headers=headers)
    assert answer.headers["x-request-id"] == "books-4711"
    assert answer.json()["id"] == "chatcmpl-books-4711"
    lost = api.post(CHAT, json=ASK | {"model": "m" * 200}, headers=headers)
    assert lost.headers["x-request-id"] == "books-4711" and len(lost.text) < 2_000
    long = api.post(CHAT, json=ASK | {"model": "m" * 100_000}, headers=headers)
    assert long.json()["error"]["param"] == "model" and len(long.text) < 2_000
    bad = api.post("/v1/messages", json={"model": "base", "max_tokens": 1, "messages": []},
                   headers=headers)  # fmt: skip
    assert bad.status_code == 400 and bad.json()["request_id"] == "books-4711"
    for _ in range(100):
        log = server.log.read_text()
        if "books-4711" in log:
            break
        time.sleep(0.1)
    assert "(request books-4711)" in log
    assert max(map(len, log.splitlines())) < 6_000
    assert "anthropic/api_router.py" not in log, "a client's mistake has a traceback"
    assert json.loads(lost.text)["error"]["code"] == "model_not_found"
