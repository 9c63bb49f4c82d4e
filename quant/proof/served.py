"""What a way costs in a real server: `quantserve serve` started, asked, timed and stopped.

Knows the command and the wire, nothing of models. A server has a free port of loopback, a key and a
registry of its own, and never outlives its caller.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from httpx2 import Client, HTTPError, Response, TransportError
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from quant import interrupt
from quant.errors import CompareError

TOKENS = 64  # of an answer
_REQUESTS = 8
_PROMPT = 256  # tokens at most
_START_S = 900.0  # a hang; on a machine that is busy a start may take minutes
_TAIL = 25  # lines of a server's log
_COMMAND = Path(sys.executable).with_name("quantserve")
_BASE, _ADAPTER = "base", "adapter"
# prctl(PR_SET_PDEATHSIG, SIGTERM), then the command: the server stops however we end.
_TIED = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
)


class Latency(BaseModel):
    """Of answers one after the other, the server's only ones: medians, and tokens by the clock.

    The first token comes after the prompt of `prompt_tokens` (a median). `next_token_ms` is an
    answer's time from its first piece to its last, by the tokens that came after the first.
    """

    model_config = ConfigDict(frozen=True)

    requests: int
    prompt_tokens: int
    answer_tokens: int
    first_token_ms: float
    next_token_ms: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Served:
    """What is served: an artifact, and an adapter of so much rank that every request names."""

    artifact: Path
    adapter: Path | None = None
    rank: int = 0

    def flags(self) -> list[str]:
        if self.adapter is None:
            return ["--max-adapters", "0"]
        return ["--adapter", f"{_ADAPTER}={self.adapter}", "--max-lora-rank", str(self.rank)]


def check(engine: str = "vllm", command: Path = _COMMAND) -> None:
    """CompareError where no server can be started here."""
    if find_spec(engine) is None or not command.is_file():
        missing = command.name if find_spec(engine) else engine
        raise CompareError(
            f"--latency starts `quantserve serve`, and {missing} is not installed here; install"
            " quantserve with its extra `cpu` or `gpu`, or leave --latency out"
        )


def measured(served: Served, windows: Sequence[Tensor]) -> Latency:
    """The latency of the first half of each of the first windows, [tokens] each, as a prompt.

    Temperature 0, the same number of tokens each. CompareError with the end of the server's log
    where it does not start or does not answer.
    """
    halves = [window[: min(_PROMPT, len(window) // 2)].tolist() for window in windows[:_REQUESTS]]
    # A window is no longer than what the model reads.
    tokens = min(TOKENS, max(map(len, windows)) // 2)
    model = _ADAPTER if served.adapter else _BASE
    with tempfile.TemporaryDirectory(prefix="quantserve-") as folder:
        port, key = _free_port(), f"sk-{secrets.token_urlsafe(24)}"
        command = [str(_COMMAND), "serve", str(served.artifact), *_fixed(Path(folder), port, key)]
        log = Path(folder) / "server.log"
        with running([*command, *served.flags()], log) as process, _client(port, key) as client:
            _until_ready(client, process, log)
            asked = [_body(model, prompt, tokens) for prompt in halves]
            # Once to warm up; turned around, so that no prompt's beginning is in a cache.
            timed(client, _body(model, halves[0][::-1], tokens), log)
            return _told([timed(client, body, log) for body in asked], halves)


@contextmanager
def running(
    command: Sequence[str], log: Path, grace_s: float = 60
) -> Iterator[subprocess.Popen[bytes]]:
    """The process of a command, in a session of its own, ended however the block is left."""
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-c", _TIED, *command],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace_s)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@dataclass(frozen=True, slots=True)
class Answer:
    """Seconds from asking to its first and last piece; tokens of the first piece, and in all.

    A server that is short of time sends several tokens in a piece.
    """

    first_s: float
    last_s: float
    first_tokens: int
    tokens: int

    def next_s(self) -> float:
        """Of a token after the first piece; where all came in one, of any token."""
        later = self.tokens - self.first_tokens
        return (self.last_s - self.first_s) / later if later else self.last_s / self.tokens


def timed(client: Client, body: object, log: Path) -> Answer:
    """One streamed completion. CompareError where the server refuses it, or breaks off."""
    pieces, asked = [], time.monotonic()
    try:
        with client.stream("POST", "/v1/completions", json=body) as reply:
            if reply.status_code != 200:
                raise _refused(reply, log)
            for line in reply.iter_lines():
                interrupt.check()
                part = _part(line)
                if part.get("choices") and (tokens := part["usage"]["completion_tokens"]):
                    pieces.append((time.monotonic() - asked, tokens))
    except HTTPError as fault:
        raise CompareError(f"the server broke off ({fault}); {_end_of(log)}") from fault
    if not pieces:
        raise CompareError(f"the server answered with nothing; {_end_of(log)}")
    (first, first_tokens), (last, tokens) = pieces[0], pieces[-1]
    return Answer(first, last, first_tokens, tokens)


def _fixed(folder: Path, port: int, key: str) -> list[str]:
    """What no setting of the user's environment may decide: it is another server than theirs."""
    keys = folder / "keys"
    keys.write_text(f"compare:inference:{key}\n", "utf-8")
    return [
        "--host", "127.0.0.1", "--port", str(port), "--api-key-file", str(keys),
        "--model-name", _BASE, "--state-dir", str(folder / "state"),
        "--database-url", f"sqlite:///{folder / 'registry.db'}", "--drain-timeout", "1",
    ]  # fmt: skip


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def _client(port: int, key: str) -> Client:
    headers = {"authorization": f"Bearer {key}"}
    # A proxy of the environment's has no business on loopback.
    return Client(
        base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=_START_S, trust_env=False
    )


def _until_ready(client: Client, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end:
        interrupt.check()
        if (status := process.poll()) is not None:
            raise CompareError(f"the server ended with status {status}; {_end_of(log)}")
        try:
            if client.get("/readyz", timeout=30).status_code == 200:
                return
        except TransportError:
            pass  # nobody listens yet
        time.sleep(0.1)
    raise CompareError(f"the server is not ready after {_START_S:.0f} s; {_end_of(log)}")


def _body(model: str, prompt: Sequence[int], tokens: int) -> dict[str, object]:
    return {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }


def _part(line: str) -> dict[str, Any]:
    """What a line of the stream says; nothing where it is empty, or the last."""
    text = line.removeprefix("data: ")
    if text == line or text == "[DONE]":
        return {}
    part: dict[str, Any] = json.loads(text)
    return part


def _refused(reply: Response, log: Path) -> CompareError:
    said = reply.read().decode("utf-8", errors="replace")[:500]
    return CompareError(f"the server answered {reply.status_code}: {said}; {_end_of(log)}")


def _end_of(log: Path) -> str:
    lines = log.read_text("utf-8", errors="replace").splitlines()[-_TAIL:]
    return "\n".join(["the end of its log:", *lines]) if lines else "its log is empty"


def _told(answers: Sequence[Answer], prompts: Sequence[Sequence[int]]) -> Latency:
    return Latency(
        requests=len(answers),
        prompt_tokens=round(statistics.median(map(len, prompts))),
        answer_tokens=answers[0].tokens,
        first_token_ms=1000 * statistics.median(answer.first_s for answer in answers),
        next_token_ms=1000 * statistics.median(answer.next_s() for answer in answers),
        tokens_per_s=sum(a.tokens for a in answers) / sum(a.last_s for a in answers),
    )
