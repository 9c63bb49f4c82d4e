"""The commands that ask a running server, as typed: adapters put and swapped, a chat, `ps`."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.server import BRIEF, KEY, QUANTSERVE, QUESTION, Server

pytestmark = pytest.mark.e2e

Typed = Callable[..., tuple[str, str]]


@pytest.fixture
def typed(server: Server, tmp_path: Path) -> Typed:
    """What a command says on stdout and stderr; the key is in a file."""
    (tmp_path / "key").write_text(f"{KEY}\n")

    def run(*words: str | Path) -> tuple[str, str]:
        command = [QUANTSERVE, *map(str, words), "--key-file", str(tmp_path / "key")]
        env = {**os.environ, "QUANTSERVE_SERVER": server.url}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    return run


def test_an_adapter_from_put_to_rm(typed: Typed, loras: list[Path]) -> None:
    def changed(*words: str | Path) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(typed("adapter", *words, "--json")[0])
        return told

    def listed() -> dict[str, Any]:
        return {row["alias"]: row for row in json.loads(typed("adapter", "list", "--json")[0])}

    first = changed("put", "typed", loras[0])
    assert listed()["typed"]["version"] == first["version"]
    second = changed("canary", "typed", loras[1], "--percent", "25")["canary"]
    assert listed()["typed"]["canary"]["weight"] == 0.25
    shown, _ = typed("ps")
    assert f"{second['version']} 25 % serving" in shown
    assert changed("promote", "typed")["version"] == second["version"]
    assert changed("rollback", "typed")["version"] == first["version"]
    changed("rm", "typed")
    assert "typed" not in listed()


def test_ps_tells_the_base_and_its_kernels(typed: Typed) -> None:
    told = json.loads(typed("ps", "--json")[0])
    assert (told["base"], told["state"], told["waiting"]) == ("base", "ready", 0)
    assert told["uptime_s"] >= 0 and told["running"] == 0
    assert any("W4A16" in kernel for rank in told["layers"] for kernel in rank)


def test_a_question_is_answered_and_timed(typed: Typed) -> None:
    """By the base: the adapters here are noise, and may never come to an end."""
    answer, timing = typed("chat", "--system", BRIEF, "--ask", QUESTION)
    assert answer.strip()
    assert timing.startswith("first token ") and " tokens" in timing
