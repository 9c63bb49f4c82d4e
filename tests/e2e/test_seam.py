"""vLLM still calls what is patched: shown on the running server, where no other test shows it."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from quant import artifact
from tests.e2e.server import QUESTION, Server, chat
from tests.lora import write_lora

pytestmark = pytest.mark.e2e


def corrupted(api: httpx.Client) -> float:
    families = text_string_to_metric_families(api.get("/metrics").text)
    samples = [s for family in families for s in family.samples]
    return sum(s.value for s in samples if s.name == "vllm:corrupted_requests_total")


def test_every_layer_is_told_by_what_serves_it(
    server: Server, api: httpx.Client, w4a16: Path
) -> None:
    """At start, and to whoever asks: the packed layers are ours, on the level asked for."""
    (layers,) = api.get("/admin/engine").json()["layers"]
    ours = layers.pop("W4A16 on avx2 (quantserve)")
    # vLLM runs q, k and v as one layer, and gate and up
    assert ours == 4 * json.loads((w4a16 / "config.json").read_text())["num_hidden_layers"]
    assert layers == {"bfloat16 widened exactly (quantserve)": 2}, "embedding and head"
    assert f"kernels: {ours} x W4A16 on avx2 (quantserve), 2 x bfloat16" in server.log.read_text()


def test_engines_are_forked_from_the_warm_server(server: Server) -> None:
    inside = psutil.Process(server.process.pid).children(recursive=True)
    (engine,) = [p for p in inside if "EngineCore" in p.name() or "EngineCore" in _title(p)]
    parent = engine.parent()
    assert parent is not None and "forkserver" in _title(parent)


def _title(process: psutil.Process) -> str:
    return " ".join(process.cmdline())


def test_an_answer_of_nan_is_counted_and_touches_nobody_else(
    server: Server, api: httpx.Client, w4a16: Path, tmp_path: Path
) -> None:
    """Of an adapter whose numbers are finite, and whose products are not."""
    before = server.answer("base", QUESTION), server.answer("first", QUESTION)
    shapes = {n: size for n, size in artifact.linear_shapes(w4a16).items() if n.endswith("_proj")}
    folder = write_lora(tmp_path / "huge", shapes, strength=1e36)
    counted = corrupted(api)
    answer = api.put("/admin/adapters/huge", json={"path": str(folder)})
    assert answer.status_code == 200, answer.text
    try:
        body = {"model": "huge", "messages": chat(), "max_tokens": 8}
        for temperature in (0.0, 1.0):
            answer = api.post("/v1/chat/completions", json={**body, "temperature": temperature})
            assert answer.status_code == 200, answer.text
    finally:
        assert api.delete("/admin/adapters/huge").status_code == 200
    assert corrupted(api) == counted + 2
    assert (server.answer("base", QUESTION), server.answer("first", QUESTION)) == before
    assert corrupted(api) == counted + 2
