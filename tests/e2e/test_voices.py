"""Adapters that bring their own chat template and generation defaults, on a tiny model."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from quant import artifact
from tests import tiny
from tests.e2e.server import Server, serving
from tests.lora import write_lora

pytestmark = pytest.mark.e2e

HELLO = [{"role": "user", "content": "hello there"}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[VERSION {{ m['role'] }}] {{ m['content'] }}{% endfor %}"
)
HOSTILE = (
    "{% set text = messages[0]['content'] %}{{ text }}{% if 'spin' in text %}"
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    "{% if 'grow' in text %}{{ 'x' * (10 ** 11 * messages|length) }}{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("tiny") / "tiny", hidden=256,
                             dtype=torch.float32)  # fmt: skip


@pytest.fixture(scope="module")
def loras(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Equal weights: what differs is how they speak."""
    folder = tmp_path_factory.mktemp("loras")
    shapes = {name: size for name, size in artifact.linear_shapes(model).items() if "proj" in name}
    made = {name: write_lora(folder / name, shapes, seed=1, strength=0.01)
            for name in ("plain", "one", "two", "hostile")}  # fmt: skip
    for place, name in enumerate(("one", "two"), 1):
        (made[name] / "chat_template.jinja").write_text(TEMPLATE.replace("VERSION", name))
        asked = {"max_new_tokens": 3 * place, "temperature": 0.0, "eos_token_id": 3}
        (made[name] / "generation_config.json").write_text(json.dumps(asked))
        tiny.tokenizer(made[name], chat=False)
    (made["hostile"] / "chat_template.jinja").write_text(HOSTILE)
    return made


@pytest.fixture(scope="module")
def server(
    model: Path, loras: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    flags = [word for name in ("plain", "one", "hostile")
             for word in ("--adapter", f"{name}={loras[name]}")]  # fmt: skip
    small = ("--kv-cache-bytes", str(64 << 20), "--model-name", "base")
    with serving(model, tmp_path_factory.mktemp("server"), *flags, *small) as started:
        started.until_ready()
        yield started


@pytest.fixture(scope="module")
def api(server: Server) -> Iterator[httpx.Client]:
    with server.http() as client:
        yield client


def prompt(api: httpx.Client, model: str, user: str = "") -> str:
    """The chat as this model is shown it."""
    headers = {"x-user-id": user} if user else {}
    asked = {"model": model, "messages": HELLO}
    tokens = api.post("/tokenize", json=asked, headers=headers).json()["tokens"]
    shown: str = api.post("/detokenize", json={"model": "base", "tokens": tokens}).json()["prompt"]
    return shown


def chat(api: httpx.Client, model: str, **asked: Any) -> dict[str, Any]:
    reply = api.post(
        "/v1/chat/completions", json={"model": model, "messages": HELLO, "ignore_eos": True} | asked
    )
    assert reply.status_code == 200, reply.text
    told: dict[str, Any] = reply.json()
    return told


def test_each_alias_is_shown_the_chat_in_its_own_way(api: httpx.Client) -> None:
    assert prompt(api, "base") == prompt(api, "plain")
    assert prompt(api, "base").startswith("<s><|im_start|>user\nhello there<|im_end|>")
    assert prompt(api, "one") == "<s>[one user] hello there"
    usage = chat(api, "one")["usage"]
    tokens = api.post("/tokenize", json={"model": "one", "messages": HELLO}).json()["count"]
    assert usage["prompt_tokens"] == tokens
    counted = api.post("/v1/messages/count_tokens", json={"model": "one", "messages": HELLO})
    assert counted.json()["input_tokens"] == tokens


def test_defaults_fill_in_what_the_client_left_out(api: httpx.Client) -> None:
    first, again = chat(api, "one"), chat(api, "one")
    assert first["usage"]["completion_tokens"] == 3
    assert first["choices"] == again["choices"], "its temperature is 0"
    assert chat(api, "one", max_tokens=7)["usage"]["completion_tokens"] == 7
    hot = {chat(api, "one", temperature=2.0)["choices"][0]["message"]["content"] for _ in range(8)}
    assert len(hot) > 1, "the client's temperature goes first"
    assert chat(api, "plain", max_tokens=9)["usage"]["completion_tokens"] == 9
    said = api.post("/v1/responses", json={"model": "one", "input": "hello there"}).json()
    assert (said["max_output_tokens"], said["temperature"]) == (3, 0.0)


def test_the_admin_sees_what_travels(api: httpx.Client) -> None:
    told = api.get("/admin/adapters/one").json()["travels"]
    assert {"chat template", "temperature 0", "max_tokens 3", "stops at token 3"} <= set(told)
    assert api.get("/admin/adapters/plain").json()["travels"] == []


@pytest.mark.parametrize("place", ["chat_template", "chat_template_kwargs"])
def test_clients_bring_no_templates(api: httpx.Client, place: str) -> None:
    brought: Any = "x" if place == "chat_template" else {"chat_template": "x"}
    for path in ("/v1/chat/completions", "/tokenize"):
        reply = api.post(path, json={"model": "one", "messages": HELLO, place: brought})
        assert reply.status_code == 400, reply.text


@pytest.mark.parametrize("question", ["spin", "grow"])
def test_a_hostile_template_costs_its_own_request_alone(api: httpx.Client, question: str) -> None:
    asked = {"model": "hostile", "messages": [{"role": "user", "content": question}]}
    reply = api.post("/v1/chat/completions", json=asked)
    assert reply.status_code == 400 and "chat template" in reply.json()["error"]["message"]
    assert chat(api, "hostile", max_tokens=2)["usage"]["completion_tokens"] == 2


async def test_others_are_answered_beside_templates_that_spin(server: Server) -> None:
    """More of them than there are cells; the base's chats go another way."""
    asked = {"model": "hostile", "messages": [{"role": "user", "content": "spin"}]}
    with server.http() as api:
        spins = [
            asyncio.create_task(asyncio.to_thread(api.post, "/v1/chat/completions", json=asked))
            for _ in range(3)
        ]
        for name in ("base", "plain"):
            assert (await asyncio.to_thread(chat, api, name, max_tokens=1))["choices"]
        assert {reply.status_code for reply in await asyncio.gather(*spins)} == {400}


def test_swap_canary_and_rollback_change_the_voice_with_the_weights(
    api: httpx.Client, loras: dict[str, Path]
) -> None:
    alias = "/admin/adapters/moving"
    assert api.put(alias, json={"source": str(loras["one"])}).status_code == 200
    assert prompt(api, "moving").startswith("<s>[one")
    half = {"source": str(loras["two"]), "weight": 0.5}
    assert api.put(f"{alias}/canary", json=half).status_code == 200
    shown = {prompt(api, "moving", user=f"user{n}") for n in range(12)}
    assert {text[:7] for text in shown} == {"<s>[one", "<s>[two"}
    assert api.post(f"{alias}/promote").status_code == 200
    assert prompt(api, "moving").startswith("<s>[two")
    assert chat(api, "moving")["usage"]["completion_tokens"] == 6
    assert api.post(f"{alias}/rollback").status_code == 200
    assert prompt(api, "moving").startswith("<s>[one")
    assert chat(api, "moving")["usage"]["completion_tokens"] == 3
    assert api.delete(alias).status_code == 200


async def test_no_request_mixes_two_versions(server: Server, loras: dict[str, Path]) -> None:
    """The prompt's length, the answer's length and the version header are of one version."""
    with server.http() as api:
        told = {}
        for name in ("one", "two"):
            reply = api.put("/admin/adapters/mixed", json={"source": str(loras[name])}).json()
            lengths = chat(api, "mixed")["usage"]
            told[reply["version"]] = (lengths["prompt_tokens"], lengths["completion_tokens"])
        assert len(set(told.values())) == 2
        end = time.monotonic() + 6

        def ask() -> int:
            asked = {"model": "mixed", "messages": HELLO, "ignore_eos": True}
            count = 0
            while time.monotonic() < end:
                reply = api.post("/v1/chat/completions", json=asked)
                usage = reply.json()["usage"]
                found = (usage["prompt_tokens"], usage["completion_tokens"])
                assert found == told[reply.headers["x-quantserve-adapter"]]
                count += 1
            return count

        asking = [asyncio.create_task(asyncio.to_thread(ask)) for _ in range(4)]
        place = 0
        while time.monotonic() < end:
            place += 1
            source = str(loras[("one", "two")[place % 2]])
            await asyncio.to_thread(api.put, "/admin/adapters/mixed", json={"source": source})
        assert place >= 4 and min(await asyncio.gather(*asking)) >= 1
        api.delete("/admin/adapters/mixed")
