"""Prompt-tuned aliases answer as PEFT does, in any company, and clients send no embeddings."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from quant import artifact
from tests import tiny
from tests.e2e.server import Server, serving
from tests.lora import write_lora
from tests.soft import Reference, trained_soft, write_soft

pytestmark = [pytest.mark.e2e, pytest.mark.arithmetic]

SHORT = "the quick brown fox jumps over"
LONG = "".join(chr(97 + (place * place * 7 + place) % 26) for place in range(160))  # 149 tokens
COUNT = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("tiny") / "tiny", hidden=256,
                             dtype=torch.float32)  # fmt: skip


@pytest.fixture(scope="module")
def folders(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("adapters")
    shapes = {name: size for name, size in artifact.linear_shapes(model).items() if "proj" in name}
    return {
        "tuned": trained_soft(made / "tuned", model, "PROMPT_TUNING", tokens=7, seed=1),
        "retuned": trained_soft(made / "retuned", model, "PROMPT_TUNING", tokens=7, seed=2),
        "encoded": trained_soft(made / "encoded", model, "P_TUNING", tokens=150, seed=3),
        "lora": write_lora(made / "lora", shapes, seed=1, strength=0.05),
    }


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference(model)


@pytest.fixture(scope="module")
def server(
    model: Path, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Prompts longer than 128 tokens are read in pieces, and their blocks are cached."""
    flags = [w for name, folder in folders.items() for w in ("--adapter", f"{name}={folder}")]
    small = ("--kv-cache-bytes", str(64 << 20), "--model-name", "base")
    pieces = ("--", "--max-num-batched-tokens", "128", "--max-num-seqs", "16")
    state = tmp_path_factory.mktemp("server")
    with serving(model, state, *flags, *small, *pieces) as started:
        started.until_ready()
        yield started


@pytest.fixture(scope="module")
def api(server: Server) -> Iterator[httpx.Client]:
    with server.http() as client:
        yield client


def asked(model: str, prompt: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "prompt": prompt, "max_tokens": COUNT, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True, **more}  # fmt: skip


def complete(api: httpx.Client, model: str, prompt: str, **more: Any) -> dict[str, Any]:
    reply = api.post("/v1/completions", json=asked(model, prompt, **more))
    assert reply.status_code == 200, reply.text
    told: dict[str, Any] = reply.json()
    return told


def ids(api: httpx.Client, model: str, prompt: str, **more: Any) -> list[int]:
    found: list[int] = complete(api, model, prompt, **more)["choices"][0]["token_ids"]
    return found


@pytest.mark.parametrize("prompt", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("name", ["tuned", "retuned", "encoded"])
def test_answers_are_pefts(
    api: httpx.Client, folders: dict[str, Path], reference: Reference, name: str, prompt: str
) -> None:
    theirs = reference.tokens(folders[name], prompt, COUNT)
    assert theirs != reference.tokens(None, prompt, COUNT), "the soft prompt does not show"
    assert ids(api, name, prompt) == theirs
    assert ids(api, name, prompt) == theirs, "from the prefix cache as without it"


def test_repetition_is_penalized_as_peft_does(
    api: httpx.Client, folders: dict[str, Path], reference: Reference
) -> None:
    theirs = reference.tokens(folders["tuned"], SHORT, COUNT, repetition_penalty=1.5)
    assert ids(api, "tuned", SHORT, repetition_penalty=1.5) == theirs
    assert theirs != reference.tokens(folders["tuned"], SHORT, COUNT)


async def test_one_batch_of_soft_prompts_lora_and_base_answers_as_alone(server: Server) -> None:
    models = ("base", "tuned", "retuned", "encoded", "lora")
    with server.http() as api:
        alone = {(m, p): ids(api, m, p) for m in models for p in (SHORT, LONG)}
        assert len({tuple(answer) for answer in alone.values()}) == 10
        together = [(m, p) for p in (SHORT, LONG) for m in models] * 2
        answers = await asyncio.gather(*(asyncio.to_thread(ids, api, m, p) for m, p in together))
    assert answers == [alone[pair] for pair in together]


def test_virtual_tokens_are_billed(api: httpx.Client) -> None:
    base, tuned = (complete(api, m, SHORT)["usage"]["prompt_tokens"] for m in ("base", "tuned"))
    assert tuned == base + 7
    booked = 'quantserve_prompt_tokens_total{alias="tuned"}'
    assert booked in api.get("/metrics").text


def test_chats_stream_and_fan_out(server: Server) -> None:
    with server.client() as client:
        how: dict[str, Any] = {"model": "tuned", "max_tokens": 6, "temperature": 0}
        messages: Any = [{"role": "user", "content": "hello"}]
        whole = client.chat.completions.create(messages=messages, logprobs=True, **how)
        pieces = client.chat.completions.create(messages=messages, stream=True, **how)
        text = "".join(c.delta.content or "" for piece in pieces for c in piece.choices)
        assert text == whole.choices[0].message.content
        logprobs = whole.choices[0].logprobs
        assert logprobs is not None and len(logprobs.content or []) == 6
        many = client.completions.create(prompt=["a", "b"], n=2, **{**how, "temperature": 1.0})
        assert len(many.choices) == 4


@pytest.mark.parametrize("name", ["base", "tuned", "lora"])
def test_clients_cannot_send_embeddings(api: httpx.Client, name: str) -> None:
    buffer = io.BytesIO()
    torch.save(torch.zeros(3, 256), buffer)
    sent = base64.b64encode(buffer.getvalue()).decode()
    part = {"type": "prompt_embeds", "prompt_embeds": sent}
    chat = {"model": name, "messages": [{"role": "user", "content": [part]}]}
    for path, body in (
        ("/v1/completions", {"model": name, "prompt_embeds": sent}),
        ("/v1/completions", {"model": name, "prompt": "x", "prompt_embeds": [sent]}),
        ("/v1/chat/completions", chat),
        ("/tokenize", chat),
    ):
        reply = api.post(path, json={**body, "max_tokens": 2} if path != "/tokenize" else body)
        assert reply.status_code == 400, reply.text


@pytest.mark.parametrize("name", ["base", "tuned"])
def test_tokens_out_of_range_are_refused_and_hurt_nobody(api: httpx.Client, name: str) -> None:
    for wrong in ([tiny.VOCAB], [5, 10**6]):
        reply = api.post("/v1/completions", json={"model": name, "prompt": wrong})
        assert reply.status_code == 400 and "vocabulary" in reply.text
    placeholder = complete(api, name, "a <prompt_embeds> b", max_tokens=1)
    assert placeholder["usage"]["completion_tokens"] == 1


def test_what_virtual_tokens_cannot_have_is_refused(api: httpx.Client) -> None:
    asks = {"model": "tuned", "prompt": SHORT, "max_tokens": 2}
    for more in ({"echo": True, "logprobs": 1}, {"prompt_logprobs": 1}):
        reply = api.post("/v1/completions", json=asks | more)
        assert reply.status_code == 400 and "virtual tokens" in reply.text
    full = api.post("/v1/completions", json={"model": "tuned", "prompt": [5] * 508})
    assert full.status_code == 400 and "longer than the maximum" in full.text
    last = complete(api, "tuned", [5] * 500, max_tokens=100)["usage"]  # type: ignore[arg-type]
    assert last["prompt_tokens"] + last["completion_tokens"] == 512


def test_prefix_tuning_is_refused_with_the_reason(
    api: httpx.Client, model: Path, tmp_path: Path
) -> None:
    parent = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(parent, config).save_pretrained(tmp_path / "prefix")
    wide = write_soft(tmp_path / "wide", torch.randn(3, 128))
    for folder, param in ((tmp_path / "prefix", "peft_type"), (wide, "width")):
        reply = api.put("/admin/adapters/refused", json={"source": str(folder)})
        assert reply.status_code == 422 and reply.json()["error"]["param"] == param
    assert "every layer's cache" in api.put(
        "/admin/adapters/refused", json={"source": str(tmp_path / "prefix")}
    ).json()["error"]["message"]  # fmt: skip


def test_versions_roll_forward_and_back_over_kinds(
    api: httpx.Client, folders: dict[str, Path]
) -> None:
    """A soft prompt may follow a LoRA, be a canary beside it, and give way to it again."""
    alias, solo = "/admin/adapters/moving", {n: ids(api, n, SHORT) for n in ("lora", "tuned")}
    assert api.put(alias, json={"source": str(folders["lora"])}).json()["virtual_tokens"] == 0
    half = {"source": str(folders["tuned"]), "weight": 0.5}
    assert api.put(f"{alias}/canary", json=half).status_code == 200
    seen = {tuple(ids(api, "moving", SHORT, user=f"user{n}")) for n in range(12)}
    assert seen == {tuple(answer) for answer in solo.values()}
    assert api.post(f"{alias}/promote").json()["virtual_tokens"] == 7
    assert ids(api, "moving", SHORT) == solo["tuned"]
    assert api.post(f"{alias}/rollback").status_code == 200
    assert ids(api, "moving", SHORT) == solo["lora"]
    assert api.delete(alias).status_code == 200


def test_a_killed_engine_comes_back_with_its_soft_prompts(server: Server) -> None:
    """Last of this file: the whole worker starts anew."""
    with server.http() as api:
        before = ids(api, "tuned", SHORT)
        for child in _children(server.process.pid):
            os.kill(child, signal.SIGKILL)
        server.until_ready()
        while not api.get("/v1/models/tuned").is_success:
            pass
        assert ids(api, "tuned", SHORT) == before


def _children(parent: int) -> list[int]:
    told = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    return [int(word) for word in told.split()]
