"""Starts the real `quantserve serve` and asks it through real clients."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import httpx
import openai
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionTokenLogprob

QUANTSERVE = str(Path(sys.executable).with_name("quantserve"))
KEY = "sk-test-everything-0123456789"
APP_KEY = "sk-test-inference-0123456789"
KEYS = f"tests:admin:{KEY}\napp:inference:{APP_KEY}\n"
QUESTION = "What is the capital of France?"
BRIEF = "You answer in one short English sentence."
GREEDY: dict[str, Any] = {
    "max_tokens": 24, "temperature": 0, "logprobs": True, "top_logprobs": 2
}  # fmt: skip
# Nats. A batch, a cached prefix or another processor move a log-probability in float32 by 2e-3.
NEAR_TIE = 0.05
# In float32 on every machine, so that what is served can be held to what is computed apart.
LEVEL = os.environ.get("QUANTSERVE_MAX_CPU_ISA", "avx2")
START_TIMEOUT_S = 600  # a hang; on a machine shared by many a start may take minutes


def chat(question: str = QUESTION) -> list[ChatCompletionMessageParam]:
    return [{"role": "system", "content": BRIEF}, {"role": "user", "content": question}]


@dataclass(frozen=True)
class Answer:
    """What was said at temperature 0: tokens, and by how many nats each led the next likeliest."""

    tokens: tuple[str, ...]
    leads: tuple[float, ...]

    @classmethod
    def of(cls, told: Iterable[ChatCompletionTokenLogprob]) -> Answer:
        tokens, leads = [], []
        for token in told:
            first, second = sorted((each.logprob for each in token.top_logprobs), reverse=True)[:2]
            tokens.append(token.token)
            leads.append(first - second)
        return cls(tuple(tokens), tuple(leads))

    def is_as(self, other: Answer) -> bool:
        """The same up to the first near tie, which any arithmetic may turn."""
        pairs = zip_longest(self.tokens, other.tokens)
        place = next((place for place, (one, its) in enumerate(pairs) if one != its), None)
        if place is None:
            return True
        leads = [answer.leads[place] for answer in (self, other) if place < len(answer.leads)]
        return max(leads) < NEAR_TIE

    def __str__(self) -> str:
        return "".join(self.tokens)


@dataclass(frozen=True)
class Server:
    """A running server; `log` is what its parent said."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def http(self) -> httpx.Client:
        headers = {"authorization": f"Bearer {KEY}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=START_TIMEOUT_S)

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=START_TIMEOUT_S
        )

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=START_TIMEOUT_S
        )

    def answer(self, model: str, question: str = QUESTION) -> Answer:
        with self.client() as client:
            reply = client.chat.completions.create(model=model, messages=chat(question), **GREEDY)
        logprobs = reply.choices[0].logprobs
        assert logprobs is not None and logprobs.content, "nothing was said"
        return Answer.of(logprobs.content)

    def log_probabilities(self, model: str, prompt: str) -> list[float]:
        """What it gives every token of `prompt` but the first, which nothing predicts."""
        body = {"model": model, "prompt": prompt, "max_tokens": 1, "prompt_logprobs": 0}
        with self.http() as api:
            answer = api.post("/v1/completions", json=body)
        assert answer.status_code == httpx.codes.OK, answer.text
        told = answer.json()["choices"][0]["prompt_logprobs"][1:]
        return [next(iter(token.values()))["logprob"] for token in told]

    def until_ready(self, seconds: float = START_TIMEOUT_S) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, f"the server ended:\n{self.log.read_text()}"
            try:
                if httpx.get(f"{self.url}/readyz", timeout=300).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise AssertionError(f"not ready after {seconds} s:\n{self.log.read_text()}")


@contextmanager
def serving(
    artifact: Path, folder: Path, *flags: str, isa: str = LEVEL, **settings: object
) -> Iterator[Server]:
    """`quantserve serve ARTIFACT` with keys, by default as on a machine of the LEVEL under test.

    `settings` go into the environment, as QUANTSERVE_*; without a port, any that is free: the
    server says which.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "keys").write_text(KEYS)
    (folder / "keys").chmod(0o600)  # whatever the umask: others must not be able to write it
    settings.setdefault("port", 0)
    log = folder / "server.log"
    command = [QUANTSERVE, "serve", str(artifact), "--max-cpu-isa", isa]
    command += ["--api-key-file", str(folder / "keys"), *flags]
    env = {**os.environ, **{f"QUANTSERVE_{name.upper()}": str(settings[name]) for name in settings}}
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, stdout=sink, stderr=sink, start_new_session=True, env=env
        )
    try:
        yield Server(_address(process, log), process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """Where it says that it listens, which it does before it loads anything."""
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end and process.poll() is None:
        if found := re.search(r"listening on (\S+)\n", log.read_text()):
            return found[1]
        time.sleep(0.05)
    raise AssertionError(f"the server said no address:\n{log.read_text()}")
