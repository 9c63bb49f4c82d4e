"""vLLM still calls what is patched: shown on the running server, where no other test shows it."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.server import Server

pytestmark = pytest.mark.e2e


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
