"""Adapters on the running server: mixed batches, swaps under load, refusals."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx
import openai
import pytest
from safetensors.torch import load_file, save_file

from tests.e2e.server import GREEDY, QUESTION, Answer, Server, chat
from tests.lora import write_lora

pytestmark = pytest.mark.e2e

QUESTIONS = (QUESTION, "Name a colour.", "Who wrote Hamlet?", "What is two plus two?")


def put(api: httpx.Client, alias: str, folder: Path) -> httpx.Response:
    return api.put(f"/admin/adapters/{alias}", json={"path": str(folder)})


async def ask(client: openai.AsyncOpenAI, model: str, question: str) -> Answer:
    stream = await client.chat.completions.create(
        model=model, messages=chat(question), stream=True, **GREEDY
    )
    choices = [choice async for chunk in stream for choice in chunk.choices]
    return Answer.of(t for c in choices if c.logprobs for t in c.logprobs.content or ())


async def test_base_and_two_adapters_in_one_batch_answer_as_alone(
    server: Server, api: httpx.Client, loras: list[Path]
) -> None:
    assert put(api, "second", loras[1]).status_code == 200
    models = ("base", "first", "second")
    alone = {model: server.answer(model) for model in models}
    assert len(set(map(str, alone.values()))) == 3, f"the adapters do not show: {alone}"
    async with server.async_client() as client:
        asked = [(model, ask(client, model, QUESTION)) for _ in range(4) for model in models]
        together = await asyncio.gather(*(answer for _, answer in asked))
    for (model, _), given in zip(asked, together, strict=True):
        assert given.is_as(alone[model]), f"{model}: {given} is not {alone[model]}"
    removed = await asyncio.to_thread(api.delete, "/admin/adapters/second")
    assert removed.status_code == 200


async def test_swaps_under_load_lose_and_mix_nothing(
    server: Server, api: httpx.Client, loras: list[Path]
) -> None:
    solo: dict[str, list[Answer]] = {question: [] for question in QUESTIONS}
    for folder in loras[1:]:
        assert put(api, "swapped", folder).status_code == 200
        for question in QUESTIONS:
            solo[question].append(server.answer("swapped", question))
    async with server.async_client() as client:
        done = asyncio.Event()

        async def one_stream(question: str) -> list[Answer]:
            answers = []
            while not done.is_set():
                answers.append(await ask(client, "swapped", question))
            return answers

        streams = [asyncio.create_task(one_stream(QUESTIONS[i % 4])) for i in range(8)]
        for turn in range(10):
            await asyncio.sleep(0.3)
            reply = await asyncio.to_thread(put, api, "swapped", loras[1 + turn % 2])
            assert reply.status_code == 200, reply.text
        done.set()
        answers = await asyncio.gather(*streams)
    assert min(map(len, answers)) >= 1
    for place, given in enumerate(answers):
        of_versions = solo[QUESTIONS[place % 4]]
        for answer in given:
            assert any(map(answer.is_as, of_versions)), f"{answer} is of no version: {of_versions}"
    removed = await asyncio.to_thread(api.delete, "/admin/adapters/swapped")
    assert removed.status_code == 200


def test_a_version_is_told_in_the_answer(server: Server, api: httpx.Client) -> None:
    facts = api.get("/admin/adapters/first").json()
    body = {"model": "first", "prompt": "Hello", "max_tokens": 1}
    answer = api.post("/v1/completions", json=body)
    assert answer.headers["x-quantserve-adapter"] == facts["version"]
    assert answer.json()["model"] == "first"


def test_a_deleted_alias_is_unknown_at_once(
    server: Server, api: httpx.Client, loras: list[Path]
) -> None:
    put(api, "brief", loras[2])
    assert server.answer("brief").tokens
    api.delete("/admin/adapters/brief")
    with pytest.raises(openai.NotFoundError):
        server.answer("brief")
    assert api.delete("/admin/adapters/brief").status_code == 404


def bad_shape(folder: Path, good: Path) -> str:
    write_lora(folder, {"model.layers.0.self_attn.q_proj": (64, 64)})
    return "model.layers.0.self_attn.q_proj"


def pickle(folder: Path, good: Path) -> str:
    folder.mkdir()
    (folder / "adapter_config.json").write_text((good / "adapter_config.json").read_text())
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    return ""


def high_rank(folder: Path, good: Path) -> str:
    write_lora(folder, {"model.layers.0.self_attn.q_proj": (576, 576)}, rank=17)
    return "rank"


def truncated(folder: Path, good: Path) -> str:
    write_lora(folder, {"model.layers.0.self_attn.q_proj": (576, 576)})
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return ""


def not_finite(folder: Path, good: Path) -> str:
    write_lora(folder, {"model.layers.0.self_attn.q_proj": (576, 576)})
    tensors = load_file(folder / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    tensors[name][0, 0] = float("inf")
    save_file(tensors, folder / "adapter_model.safetensors")
    return name


def dora(folder: Path, good: Path) -> str:
    write_lora(folder, {"model.layers.0.self_attn.q_proj": (576, 576)})
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    return "use_dora"


def missing(folder: Path, good: Path) -> str:
    return "folder"


@pytest.mark.parametrize(
    "spoil", [bad_shape, pickle, high_rank, truncated, not_finite, dora, missing]
)
def test_a_bad_adapter_is_4xx_with_the_field_and_changes_nothing(
    spoil: object, api: httpx.Client, loras: list[Path], tmp_path: Path
) -> None:
    assert callable(spoil)
    field = spoil(tmp_path / "bad", loras[0])
    before = api.get("/admin/adapters").json()
    answer = put(api, "first", tmp_path / "bad")
    assert 400 <= answer.status_code < 500, answer.text
    fault = answer.json()["error"]
    assert fault["message"] and (not field or fault["param"] == field)
    assert api.get("/admin/adapters").json() == before


def test_tokens_are_booked_on_the_alias(server: Server, api: httpx.Client) -> None:
    def booked() -> float:
        for line in api.get("/metrics").text.splitlines():
            if line.startswith('quantserve_generation_tokens_total{alias="first"}'):
                return float(line.split()[-1])
        return 0.0

    before = booked()
    api.post("/v1/completions", json={"model": "first", "prompt": "Hi", "max_tokens": 5,
                                      "ignore_eos": True})  # fmt: skip
    assert booked() == before + 5
