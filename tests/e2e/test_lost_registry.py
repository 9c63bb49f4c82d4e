"""What an adapter, a name or a damaged file may not do to a running server; on a tiny model."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from quant import artifact
from tests import tiny
from tests.e2e.server import QUANTSERVE, Server, serving
from tests.lora import write_lora

pytestmark = pytest.mark.e2e

HELLO = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("tiny") / "tiny", hidden=256,
                             dtype=torch.float32)  # fmt: skip


@pytest.fixture(scope="module")
def shapes(model: Path) -> dict[str, tuple[int, int]]:
    found = artifact.linear_shapes(model)
    return {name: size for name, size in found.items() if "proj" in name}


@pytest.fixture(scope="module")
def loras(shapes: dict[str, tuple[int, int]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("loras")
    return [write_lora(folder / f"l{seed}", shapes, seed=seed, strength=0.05) for seed in (1, 2)]


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def server(model: Path, state: Path, loras: list[Path]) -> Iterator[Server]:
    flags = ("--kv-cache-bytes", str(64 << 20), "--model-name", "base")
    names = ("--", "--served-model-name", "base", "also-base")
    with serving(model, state / "server", *flags, *names, state_dir=state) as started:
        started.until_ready()
        with started.http() as client:
            put(client, "legal", loras[0]).raise_for_status()
        yield started


@pytest.fixture(scope="module")
def api(server: Server) -> Iterator[httpx.Client]:
    with server.http() as client:
        yield client


def put(api: httpx.Client, alias: str, source: Path) -> httpx.Response:
    return api.put(f"/admin/adapters/{alias}", json={"source": str(source)})


def ask(api: httpx.Client, model: str) -> httpx.Response:
    body = {"model": model, "messages": HELLO, "max_tokens": 4, "temperature": 0}
    return api.post("/v1/chat/completions", json=body)


def until(holds: Callable[[], bool]) -> None:
    """What the server comes to by itself, at its next look at the registry."""
    end = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("generation_config.json", {"stop_strings": [""]}),
        ("generation_config.json", {"temperature": 1e308}),
        ("generation_config.json", {"top_k": 10**20}),
        ("generation_config.json", {"eos_token_id": 31_000}),
        ("chat_template.jinja", "{% include 'x' %}"),
        ("chat_template.jinja", "{{ 'x' * 1000000 }}"),
        ("chat_template.jinja", "{% for n in range(9000) %}{{ messages[0].content }} {% endfor %}"),
        ("chat_template.jinja", '{{ "" }}'),
    ],
)
def test_what_would_fail_every_request_is_refused_and_the_version_stays(
    api: httpx.Client, shapes: Any, tmp_path: Path, name: str, content: Any
) -> None:
    folder = write_lora(tmp_path / "lora", shapes, seed=7)
    told = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(told)
    before = ask(api, "legal")
    refused = put(api, "legal", folder)
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "adapter_refused")
    after = ask(api, "legal")
    assert after.headers["x-quantserve-adapter"] == before.headers["x-quantserve-adapter"]
    assert after.json()["choices"] == before.json()["choices"]


@pytest.mark.parametrize("name", ["base", "also-base"])
def test_the_base_answers_to_its_names(api: httpx.Client, loras: list[Path], name: str) -> None:
    assert put(api, name, loras[1]).status_code == 400
    answer = ask(api, name)
    assert answer.status_code == 200 and "x-quantserve-adapter" not in answer.headers


def test_a_version_is_a_model_of_its_own_name(api: httpx.Client, loras: list[Path]) -> None:
    made = api.put("/admin/adapters/legal/canary", json={"source": str(loras[1]), "weight": 0})
    canary, stable = made.json()["canary"]["version"], made.json()["version"]
    for version in (canary, stable):
        answer = ask(api, version)
        assert answer.headers["x-quantserve-adapter"] == version
        assert answer.json()["model"] == "legal"
        assert api.get(f"/v1/models/{version}").json()["id"] == version
    assert ask(api, "legal").headers["x-quantserve-adapter"] == stable
    assert ask(api, canary).json()["choices"] != ask(api, stable).json()["choices"]
    assert ask(api, "legal@0123456789ab").status_code == 404
    series = api.get("/metrics").text
    assert 'quantserve_requests_total{alias="legal"' in series
    assert f'alias="{canary}"' not in series
    api.delete("/admin/adapters/legal/canary").raise_for_status()


def test_a_registry_of_garbage_is_survived_restarted_over_and_restored(
    server: Server, api: httpx.Client, state: Path, loras: list[Path]
) -> None:
    before = ask(api, "legal").json()["choices"]
    file = state / "registry.sqlite"
    file.write_bytes(b"garbage!" * 512)
    refused = put(api, "chat", loras[1])
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "registry_unavailable")
    assert "quantserve registry" in refused.json()["error"]["message"]
    until(lambda: "quantserve_registry_up 0.0" in api.get("/metrics").text)
    assert ask(api, "legal").json()["choices"] == before
    children = psutil.Process(server.process.pid).children(recursive=True)
    next(child for child in children if "serve.worker" in " ".join(child.cmdline())).kill()
    psutil.wait_procs(children, timeout=300)
    server.until_ready()
    assert ask(api, "legal").json()["choices"] == before
    assert file.read_bytes() == b"garbage!" * 512
    command = [QUANTSERVE, "registry", "restore", "--state-dir", str(state), "--yes"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    until(lambda: put(api, "chat", loras[1]).status_code == httpx.codes.OK)
    listed = {fact["alias"]: fact["state"] for fact in api.get("/admin/adapters").json()["data"]}
    assert listed == {"chat": "serving", "legal": "serving"}
