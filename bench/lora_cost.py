"""What LoRA costs a whole server on CPU: switched on and unused, and used by every request.

Two servers of one artifact run side by side, one without LoRA, one with a rank-16 adapter on every
linear layer. Short rounds of the same prompts go in turn to the first, to the base of the second
and to its adapter, in rotating order. Every figure is the median over rounds of the ratio to the
first one's in the same round, with quartiles; tokens per CPU second of the server are of all rounds
together, and do not mind busy neighbours. Exit status 1 when a claim does not hold: output tokens
per second, by the clock and by the processor, at least 0.97 for base and 0.75 for adapter traffic.

    python -m bench.lora_cost ARTIFACT --isa avx2
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import numpy as np
import psutil

from bench.serve import Load, Server, cpu_s, loop, running, stream
from quant.lora import served
from tests.lora import write_lora

BASE, ADAPTER = "base", "adapter"
OFF, IDLE, USED = "no LoRA", "LoRA on, unused", "every request on rank 16"
LEAST = {IDLE: 0.97, USED: 0.75}


@dataclass(slots=True)
class Measured:
    """One contender at one number of streams."""

    rounds: list[Load] = field(default_factory=list)
    cpu_s: float = 0.0  # of all of them


def main() -> None:
    args = _arguments()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as kept:
        shapes = served.layers(args.artifact)
        lora = write_lora(Path(folder) / ADAPTER, shapes, rank=16, strength=0.02)
        flags = {"off": ["--max-adapters", "0"], "on": ["--adapter", f"{ADAPTER}={lora}"]}
        servers = [
            kept.enter_context(running(_server(name, args, given))) for name, given in flags.items()
        ]
        measured = asyncio.run(_measure([(port, server) for port, _, server in servers], args))
    held = [_row(level, name, found) for level, found in measured.items() for name in LEAST]
    sys.exit(0 if all(held) else 1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--isa", choices=["auto", "avx2"], default="auto")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=48)
    return parser.parse_args()


def _server(name: str, args: argparse.Namespace, flags: list[str]) -> Server:
    command = [str(Path(sys.executable).with_name("quantserve")), "serve", str(args.artifact)]
    command += ["--port", "{port}", "--model-name", BASE, "--max-cpu-isa", args.isa, *flags]
    return Server(f"lora-{name}", command)


async def _measure(
    servers: list[tuple[int, psutil.Process]], args: argparse.Namespace
) -> dict[int, dict[str, Measured]]:
    timeout = aiohttp.ClientTimeout(total=None)
    measured = {}
    async with AsyncExitStack() as kept:
        (off, off_server), (on, on_server) = [
            (await kept.enter_async_context(aiohttp.ClientSession(url, timeout=timeout)), server)
            for url, server in ((f"http://127.0.0.1:{port}", server) for port, server in servers)
        ]
        contenders = [
            (OFF, off, BASE, off_server),
            (IDLE, on, BASE, on_server),
            (USED, on, ADAPTER, on_server),
        ]
        for _, session, model, _ in contenders:
            await stream(session, model, random.Random(0), 16)
        for level in args.concurrency:
            measured[level] = found = {name: Measured() for name, *_ in contenders}
            for number in range(args.rounds):
                for place in range(len(contenders)):
                    name, session, model, server = contenders[(number + place) % len(contenders)]
                    words, spent = random.Random(f"{level} {number}"), cpu_s(server)
                    load = await loop(session, model, words, (level, 1, args.tokens))
                    found[name].rounds.append(load)
                    found[name].cpu_s += cpu_s(server) - spent
    return measured


def _row(level: int, name: str, found: dict[str, Measured]) -> bool:
    """Print one line; whether its claims hold."""
    pairs = list(zip(found[name].rounds, found[OFF].rounds, strict=True))
    speed = [mine.tokens_per_s / without.tokens_per_s for mine, without in pairs]
    gaps = [mine.itl_s / without.itl_s for mine, without in pairs]
    thrift = found[OFF].cpu_s / found[name].cpu_s  # of the same number of tokens
    held = min(float(np.median(speed)), thrift) >= LEAST[name]
    plain = np.median([load.tokens_per_s for load in found[OFF].rounds])
    print(
        f"{level:3} streams, {plain:6.1f} tokens/s without | {name:25} tokens/s {_spread(speed)}, "
        f"ITL {_spread(gaps)}, per CPU second {thrift:.3f}{'' if held else '   FAILS'}",
        flush=True,
    )
    return held


def _spread(ratios: list[float]) -> str:
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return f"{middle:.3f} ({low:.3f} .. {high:.3f})"


if __name__ == "__main__":
    main()
