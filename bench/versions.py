"""Adapters that say different things, and a client that tells which of them has answered.

A row's arithmetic does not depend on what shares its batch (DECISIONS.md), so answers are compared
as they are, token by token. They differ between any two versions, else a check would be void.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from quant.lora import served
from tests.lora import write_lora

BASE = "base"
ALIASES = ("legal", "medical", "pirate")
RANKS = (8, 16)  # of an alias's two versions
STRENGTH = 0.02  # of the adapters: other words, but no coin tossed at every token
TOKENS = 32
SUBJECTS = ("river", "old bridge", "winter", "engine", "market", "garden", "letter", "song")
PROMPTS = tuple(f"What everybody should know about the {subject}:" for subject in SUBJECTS)


@dataclass(frozen=True, slots=True)
class Answer:
    """One request as its client saw it; times are monotonic seconds."""

    model: str
    prompt: str
    sent: float
    version: str  # the header's
    text: str
    times: tuple[float, ...]  # of the chunks that carried a token
    fault: str = ""


@dataclass(slots=True)
class Solo:
    """What every version says alone, and the prompts to which no two say the same."""

    answers: dict[tuple[str, str], str] = field(default_factory=dict)  # (version, prompt) -> text
    prompts: list[str] = field(default_factory=list)

    def right(self, answer: Answer) -> bool:
        return self.answers[answer.version, answer.prompt].startswith(answer.text)


class PutFailed(Exception):
    pass


@dataclass(frozen=True, slots=True)
class Client:
    """The server's API; `folders` are the versions of each alias."""

    session: aiohttp.ClientSession
    folders: dict[str, list[Path]]

    async def put(self, alias: str, which: int) -> str:
        body = {"source": str(self.folders[alias][which])}
        async with self.session.put(f"/admin/adapters/{alias}", json=body) as answer:
            told = await answer.json()
        if answer.status != 200:
            raise PutFailed(f"PUT {alias}: {answer.status}: {told}")
        return str(told["version"])

    async def ask(self, model: str, prompt: str, tokens: int = TOKENS) -> Answer:
        body = {
            "model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0,
            "ignore_eos": True, "stream": True,
            # A chunk may carry two tokens where the server had no time for two chunks.
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }  # fmt: skip
        times: list[float] = []
        sent, text, version, fault = time.monotonic(), "", "", "no [DONE]"
        try:
            async with self.session.post("/v1/completions", json=body) as answer:
                version = answer.headers.get("x-quantserve-adapter", "")
                if answer.status != 200:
                    fault = f"{answer.status}: {await answer.text()}"
                async for line in answer.content:
                    if line.startswith(b"data: [DONE]"):
                        fault = "" if len(times) == tokens else f"{len(times)} of {tokens} tokens"
                        break
                    told = json.loads(line[6:]) if line.startswith(b"data: {") else {}
                    if "error" in told:
                        fault = str(told["error"])
                        break
                    if told.get("choices"):
                        fresh = told["usage"]["completion_tokens"] - len(times)
                        times += [time.monotonic()] * fresh
                        text += told["choices"][0]["text"]
        except aiohttp.ClientError as broken:
            fault = str(broken) or type(broken).__name__
        return Answer(model, prompt, sent, version, text, tuple(times), fault)


async def learn(client: Client, prompts: tuple[str, ...] = PROMPTS) -> Solo:
    """Ask every version alone; each alias is left at its last one."""
    solo = Solo()
    for model in (BASE, *client.folders):
        for which in range(len(client.folders.get(model, "1"))):
            version = await client.put(model, which) if model != BASE else ""
            for prompt in prompts:
                solo.answers[version, prompt] = (await client.ask(model, prompt)).text
    for prompt in prompts:
        said = [text for (_, asked), text in solo.answers.items() if asked == prompt]
        if len(set(said)) == len(said):
            solo.prompts.append(prompt)
    if not solo.prompts:
        raise ValueError("no prompt tells the versions apart: the check would be void")
    return solo


def write_versions(folder: Path, base: Path) -> dict[str, list[Path]]:
    """Two adapters for every alias, on all linear layers of `base`."""
    shapes = served.layers(base)
    return {
        alias: [
            write_lora(folder / f"{alias}{which}", shapes, rank=rank,
                       seed=len(RANKS) * place + which, strength=STRENGTH)
            for which, rank in enumerate(RANKS)
        ]
        for place, alias in enumerate(ALIASES)
    }  # fmt: skip
