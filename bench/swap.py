"""What 200 adapter swaps under load cost, and whether any answer was lost, mixed or late.

A real server, 16 streams that ask again as soon as they are answered (4 of the base, 4 of each of
three aliases), and windows in which an alias gets its other version every other second, in turn
with windows in which nothing is swapped. Afterwards swaps without a pause, for the memory. Exit
status 1 when a claim does not hold:

- no request fails;
- every answer at temperature 0 is the solo answer of the version that its header names, and who
  asks after a PUT was answered gets the new version;
- throughput is at least 0.95 of that without swaps (median over pairs of neighbouring windows);
  only a quiet machine can tell: beside other work, a server that swaps gets more of the processor;
- memory does not grow over the later half of 1,000 swaps.

A row's arithmetic does not depend on what shares its batch (DECISIONS.md), so answers are compared
as they are, token by token. They differ between any two versions, else the check would be void.

    python -m bench.swap ARTIFACT --isa avx2
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import numpy as np
import psutil

from bench.serve import Server, cpu_s, running
from quant import artifact
from tests.lora import write_lora

BASE = "base"
ALIASES = ("legal", "medical", "pirate")
RANKS = (8, 16)  # of an alias's two versions
STRENGTH = 0.02  # of the adapters: other words, but no coin tossed at every token
CLIENTS_PER_MODEL = 4
TOKENS, PROBE_TOKENS = 32, 4
LEAST_THROUGHPUT = 0.95
FLAT_MIB = 16.0  # growth per 1,000 swaps that passes for none, of some 1,300 MiB
SAMPLE_EVERY = 12  # swaps between looks at the memory: every time the same versions are there
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


@dataclass(frozen=True, slots=True)
class Swap:
    alias: str
    version: str
    sent: float
    answered: float


@dataclass(frozen=True, slots=True)
class Window:
    began: float
    ended: float
    cpu_s: float  # that the server's processes spent in it
    swapping: bool

    def tokens(self, answers: list[Answer]) -> int:
        """How many arrived in it."""
        times = itertools.chain.from_iterable(answer.times for answer in answers)
        return sum(self.began <= at < self.ended for at in times)

    def rate(self, answers: list[Answer]) -> float:
        return self.tokens(answers) / (self.ended - self.began)

    def thrift(self, answers: list[Answer]) -> float:
        """Tokens per second of the processor, of which every PUT takes its part."""
        return self.tokens(answers) / self.cpu_s


@dataclass(slots=True)
class Log:
    """Everything that happened."""

    answers: list[Answer] = field(default_factory=list)  # of the streams
    probes: list[Answer] = field(default_factory=list)
    swaps: list[Swap] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    hurried: Window | None = None
    switched: list[float] = field(default_factory=list)  # seconds, PUT to first token
    unswitched: list[float] = field(default_factory=list)  # the same request without a PUT
    memory: list[tuple[int, float]] = field(default_factory=list)  # (swaps so far, MiB)


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


def main() -> None:
    args = _arguments()
    with tempfile.TemporaryDirectory() as folder, running(_server(args)) as (port, _, server):
        loras = write_versions(Path(folder), args.artifact)
        log, solo = asyncio.run(_measure(f"http://127.0.0.1:{port}", server, loras, args))
    sys.exit(_report(log, solo, args))


def write_versions(folder: Path, base: Path) -> dict[str, list[Path]]:
    """Two adapters for every alias, on all linear layers of `base`."""
    shapes = artifact.linear_shapes(base)
    return {
        alias: [
            write_lora(folder / f"{alias}{which}", shapes, rank=rank,
                       seed=len(RANKS) * place + which, strength=STRENGTH)
            for which, rank in enumerate(RANKS)
        ]
        for place, alias in enumerate(ALIASES)
    }  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--isa", choices=["auto", "avx2"], default="auto")
    parser.add_argument("--rounds", type=int, default=10, help="pairs of windows")
    parser.add_argument("--swaps", type=int, default=20, help="in a window")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two swaps")
    parser.add_argument("--total", type=int, default=1000, help="swaps until memory is judged")
    return parser.parse_args()


def _server(args: argparse.Namespace) -> Server:
    quantserve = str(Path(sys.executable).with_name("quantserve"))
    # A place for both versions of every alias: nobody waits for one.
    flags = ["--model-name", BASE, "--max-adapters", str(2 * len(ALIASES))]
    command = [quantserve, "serve", str(args.artifact), "--port", "{port}", *flags]
    return Server("swap", [*command, "--max-cpu-isa", args.isa])


async def _measure(
    url: str, server: psutil.Process, loras: dict[str, list[Path]], args: argparse.Namespace
) -> tuple[Log, Solo]:
    # A connection per request: the server closes those that were idle for five seconds, perhaps
    # just as one is taken up again.
    connections = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(url, connector=connections, timeout=timeout) as session:
        client = Client(session, loras)
        solo = await learn(client)
        _say(f"{len(solo.prompts)} of {len(PROMPTS)} prompts tell all versions apart")
        run, done = Run(client, solo, server), asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for place, model in enumerate(CLIENTS_PER_MODEL * (BASE, *ALIASES)):
                group.create_task(run.stream(model, place, done))
            await asyncio.sleep(5)
            for number in range(args.rounds):
                for swapping in (True, False) if number % 2 else (False, True):  # drift cancels
                    await run.window(args.swaps, args.every, swapping=swapping)
            await run.hurry(args.total)
            done.set()
    return run.log, solo


@dataclass(slots=True)
class Run:
    client: Client
    solo: Solo
    server: psutil.Process
    log: Log = field(default_factory=Log)
    at: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ALIASES, 1))

    async def stream(self, model: str, place: int, done: asyncio.Event) -> None:
        prompts = itertools.cycle(self.solo.prompts)
        for prompt in itertools.islice(prompts, place, None):
            if done.is_set():
                return
            self.log.answers.append(await self.client.ask(model, prompt))

    async def window(self, count: int, every_s: float, *, swapping: bool) -> None:
        """A short request to an alias every so often; in a swapping window, after a swap of it."""
        began, spent = time.monotonic(), cpu_s(self.server)
        async with asyncio.TaskGroup() as probes:
            for number in range(count):
                await asyncio.sleep(began + number * every_s - time.monotonic())
                alias, sent = ALIASES[number % len(ALIASES)], time.monotonic()
                if swapping:
                    await self.swap(alias)
                into = self.log.switched if swapping else self.log.unswitched
                probes.create_task(self.probe(alias, number, sent, into))
            await asyncio.sleep(began + count * every_s - time.monotonic())
            spent = cpu_s(self.server) - spent
            self.log.windows.append(Window(began, time.monotonic(), spent, swapping=swapping))
        rate = self.log.windows[-1].rate(self.log.answers)
        _say(f"{'swapping' if swapping else 'still':8} {rate:6.1f} tokens/s")

    async def swap(self, alias: str) -> None:
        self.at[alias] = 1 - self.at[alias]
        sent = time.monotonic()
        version = await self.client.put(alias, self.at[alias])
        self.log.swaps.append(Swap(alias, version, sent, time.monotonic()))

    async def probe(self, alias: str, number: int, since: float, into: list[float]) -> None:
        prompts = self.solo.prompts
        answer = await self.client.ask(alias, prompts[number % len(prompts)], PROBE_TOKENS)
        self.log.probes.append(answer)
        if not answer.fault:
            into.append(answer.times[0] - since)

    async def hurry(self, total: int) -> None:
        """Swaps one after another, until there were `total`."""
        began, spent = time.monotonic(), cpu_s(self.server)
        for number in range(len(self.log.swaps), total):
            if number % SAMPLE_EVERY == 0:
                self.log.memory.append((number, self.memory()))
            if number % 100 == 0:
                _say(f"{number} swaps, {self.memory():.0f} MiB")
            await self.swap(ALIASES[number % len(ALIASES)])
        spent = cpu_s(self.server) - spent
        self.log.hurried = Window(began, time.monotonic(), spent, swapping=True)

    def memory(self) -> float:
        """Resident MiB of the server's processes, all of them together."""
        everyone = [self.server, *self.server.children(recursive=True)]
        return float(sum(each.memory_info().rss for each in everyone)) / (1 << 20)


def _report(log: Log, solo: Solo, args: argparse.Namespace) -> int:
    asked = log.answers + log.probes
    failed = [answer for answer in asked if answer.fault]
    mixed = [answer for answer in asked if not answer.fault and not solo.right(answer)]
    late = [answer for answer in asked if _late(answer, log.swaps)]
    for wrong in (failed + mixed + late)[:3]:
        print(f"{wrong}\n  expected {solo.answers.get((wrong.version, wrong.prompt))!r}")
    growth = _growth(log.memory)
    paced = args.rounds * args.swaps
    puts = [swap.answered - swap.sent for swap in log.swaps[:paced]]
    rows = [
        ("requests; failed", f"{len(asked)}; {len(failed)}", not failed),
        ("answers that are no solo answer of their version", f"{len(mixed)}", not mixed),
        ("answers of an older version than the last PUT", f"{len(late)}", not late),
        *_throughput(log, f"{paced} swaps, one every {args.every:g} s"),
        ("PUT, ms (p50 / p99)", _percentiles(puts), True),
        ("from PUT to the new version's first token, ms", _percentiles(log.switched), True),
        ("the same request without a PUT, ms", _percentiles(log.unswitched), True),
        (f"memory per 1,000 swaps, over the last {args.total // 2}",
         f"{growth:+.1f} MiB of {log.memory[-1][1]:.0f}", growth < FLAT_MIB),
    ]  # fmt: skip
    for name, figure, held in rows:
        print(f"{name:56} {figure}{'' if held else '   FAILS'}")
    return 0 if all(held for _, _, held in rows) else 1


def _throughput(log: Log, what: str) -> list[tuple[str, str, bool]]:
    """Each swapping window as a ratio to its still neighbour, by the clock and by the processor."""
    pairs = [
        (first, second) if first.swapping else (second, first)
        for first, second in zip(log.windows[::2], log.windows[1::2], strict=True)
    ]
    clock = [a.rate(log.answers) / b.rate(log.answers) for a, b in pairs]
    thrift = [a.thrift(log.answers) / b.thrift(log.answers) for a, b in pairs]
    rows = [
        (f"tokens/s, {what} / none", _spread(clock), statistics.median(clock) >= LEAST_THROUGHPUT),
        ("tokens per CPU second of the server, the same", _spread(thrift), True),
    ]  # fmt: skip
    if (hurried := log.hurried) is not None:
        still = statistics.median(still.thrift(log.answers) for _, still in pairs)
        speed = (len(log.swaps) - len(log.switched)) / (hurried.ended - hurried.began)
        share = f"{hurried.thrift(log.answers) / still:.3f}"
        rows.append((f"the same without a pause, {speed:.1f} swaps a second", share, True))
    return rows


def _late(answer: Answer, swaps: list[Swap]) -> bool:
    """Whether it was sent after a PUT was answered, and given the version before.

    Not where another PUT of the alias was under way by its first token: then either is right.
    """
    mine = [swap for swap in swaps if swap.alias == answer.model]
    before = [swap for swap in mine if swap.answered < answer.sent]
    if (
        answer.fault
        or not before
        or any(swap.sent < answer.times[0] and swap.answered >= answer.sent for swap in mine)
    ):
        return False
    return answer.version != before[-1].version


def _growth(memory: list[tuple[int, float]]) -> float:
    """MiB per 1,000 swaps, of a straight line through the later half."""
    later = [(swaps, size) for swaps, size in memory if 2 * swaps >= memory[-1][0]]
    swaps, sizes = zip(*later, strict=True)
    return float(np.polyfit(swaps, sizes, 1)[0]) * 1000


def _percentiles(seconds: list[float]) -> str:
    low, high = np.percentile(seconds, [50, 99]) * 1e3
    return f"{low:.0f} / {high:.0f}"


def _spread(ratios: list[float]) -> str:
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return f"{middle:.3f} (quartiles {low:.3f} .. {high:.3f}, {len(ratios)} pairs)"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
