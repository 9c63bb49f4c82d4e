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

    python -m bench.swap ARTIFACT --isa avx2
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil

from bench.serve import Server, cpu_s, running
from bench.swap_log import Log, Swap, Window, report
from bench.versions import ALIASES, BASE, PROMPTS, Client, Solo, learn, write_versions

CLIENTS_PER_MODEL = 4
PROBE_TOKENS = 4
SAMPLE_EVERY = 12  # swaps between looks at the memory: every time the same versions are there


def main() -> None:
    args = arguments(sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder, running(_server(args)) as (port, _, server):
        loras = write_versions(Path(folder), args.artifact)
        log, solo = asyncio.run(_measure(f"http://127.0.0.1:{port}", server, loras, args))
    sys.exit(report(log, solo, args.every))


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """Exits with 2 where too few swaps would be left to judge the memory by."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--isa", choices=["auto", "avx2"], default="auto")
    parser.add_argument("--rounds", type=int, default=10, help="pairs of windows")
    parser.add_argument("--swaps", type=int, default=20, help="in a window")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two swaps")
    parser.add_argument("--total", type=int, default=1000, help="swaps until memory is judged")
    args = parser.parse_args(given)
    least = args.rounds * args.swaps + 2 * SAMPLE_EVERY
    if args.total <= least:
        parser.error(
            f"--total {args.total}: the windows swap {args.rounds} x {args.swaps} times, and memory"
            f" is judged by the swaps after them; give more than {least}, or fewer --rounds"
        )
    return args


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


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
