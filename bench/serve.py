"""Output tokens/s, TTFT and inter-token latency of our server beside plain vLLM and llama.cpp.

Each server is started in turn on a free port, warmed up, loaded by closed loops of 1, 8 and 32
streams and stopped; one table at the end, every row as a ratio to plain vLLM in float32.
Prompts are 64 random words (so no prefix is shared), answers 64 tokens with EOS ignored.

    python -m bench.serve --w4a16 DIR --w8a16 DIR --w8a8 DIR
    python -m bench.serve --only plain-float32,ours-float32  # our layer's overhead
    python -m bench.serve ... --isa avx2                # every server as an AVX2-only machine
    python -m bench.serve ... --llama-server "python -m llama_cpp.server --model FILE.gguf"
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import aiohttp
import psutil

from quant.intake import source
from serve.settings import CPU_LIMITS

BASELINE = "plain-float32"
AVX2 = CPU_LIMITS["avx2"]
# A plain vLLM process knows nothing of our ISA setting: this makes torch report what an AVX2
# machine would, before vLLM picks its C++ extension.
AVX2_VLLM = (
    "import torch, runpy\n"
    "for name in ('_is_avx512_supported', '_is_avx512_bf16_supported', '_is_amx_tile_supported'):\n"
    "    setattr(torch.cpu, name, lambda: False)\n"
    "runpy.run_module('vllm.entrypoints.launchers.api_server.entry', run_name='__main__')\n"
)
WORDS = ["river", "stone", "cloud", "engine", "market", "garden", "letter", "music", "window",
         "copper", "silver", "forest", "harbour", "bridge", "lantern", "winter", "summer",
         "orchard", "candle", "pepper", "saddle", "marble", "velvet", "anchor"]  # fmt: skip


@dataclass(frozen=True)
class Server:
    """How one contender is started; `command` takes {port}."""

    name: str
    command: list[str]
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Load:
    """What one closed loop measured."""

    tokens_per_s: float
    ttft_s: float
    itl_s: float


def main() -> None:
    args = _arguments()
    rows: dict[str, tuple[float, dict[int, Load]]] = {}
    for server in _servers(args):
        print(f"{server.name}: starting", file=sys.stderr, flush=True)
        with running(server) as (port, ready_s, _):
            loads = asyncio.run(_measure(port, args.concurrency, args.tokens))
        rows[server.name] = (ready_s, loads)
        _line(server.name, rows, args.concurrency)
    if args.json:
        Path(args.json).write_text(
            json.dumps(
                {
                    name: {"ready_s": ready, "loads": {c: vars(load) for c, load in loads.items()}}
                    for name, (ready, loads) in rows.items()
                },
                indent=1,
            )
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="demo", help="the full-precision parent, or `demo`")
    for scheme in ("w4a16", "w8a16", "w8a8"):
        parser.add_argument(f"--{scheme}", help=f"our {scheme} artifact of the same model")
    parser.add_argument("--llama-server", help="command of an OpenAI-style llama.cpp server")
    parser.add_argument("--only", default="", help="comma-separated contender names")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--isa", choices=["auto", "avx2"], default="auto")
    parser.add_argument("--json", help="also write the figures here")
    args = parser.parse_args()
    args.model = str(source.open(args.model).folder)
    return args


def _servers(args: argparse.Namespace) -> list[Server]:
    avx2 = args.isa == "avx2"
    limit = {"QUANTSERVE_MAX_CPU_ISA": "avx2"} if avx2 else {}
    entry = ["-c", AVX2_VLLM] if avx2 else ["-m", "vllm.entrypoints.launchers.api_server.entry"]
    # The same two threads and the same explicit KV cache for everyone; plain vLLM would give the
    # model one of two cores and refuse to start unless 92 % of memory is free.
    plain_env = {
        **(AVX2 if avx2 else {}),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(os.cpu_count()),
        "VLLM_PLUGINS": "none",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    shared = ["--max-model-len", "2048", "--kv-cache-memory-bytes", str(512 << 20)]
    plain = [sys.executable, *entry, "--host", "127.0.0.1", "--port", "{port}", "--enforce-eager"]
    ours = [str(Path(sys.executable).with_name("quantserve")), "serve"]
    servers = []
    for dtype in ("float32", "bfloat16"):
        command = [*plain, "--model", args.model, "--dtype", dtype, *shared]
        servers.append(Server(f"plain-{dtype}", command, plain_env))
    tail = ["--port", "{port}", "--model-name", "m", "--", *shared]
    servers.append(Server("ours-float32", [*ours, args.model, *tail, "--dtype", "float32"], limit))
    for scheme in ("w4a16", "w8a16", "w8a8"):
        if folder := vars(args)[scheme]:
            servers.append(Server(f"ours-{scheme}", [*ours, folder, *tail], limit))
    if args.llama_server:
        command = [*shlex.split(args.llama_server), "--port", "{port}"]
        servers.append(Server("llama.cpp", command, {}))
    only = [name for name in args.only.split(",") if name]
    return [server for server in servers if not only or server.name in only]


@contextlib.contextmanager
def running(server: Server) -> Iterator[tuple[int, float, psutil.Process]]:
    """Start it on a free port and stop it: port, seconds until it was ready, its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    command = [part.format(port=port) if "{port}" in part else part for part in server.command]
    log = Path(f"bench-{server.name}.log").resolve()
    started = time.monotonic()
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            env={**os.environ, **server.env},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        ready_s = asyncio.run(_until_ready(port, process, log)) - started
        yield port, ready_s, psutil.Process(process.pid)
        log.unlink()
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def cpu_s(server: psutil.Process) -> float:
    """What a server's processes have used of the processor: busy neighbours hardly change it."""
    everyone = [server, *server.children(recursive=True)]
    times = [each.cpu_times() for each in everyone]
    return float(sum(each.user + each.system for each in times))


async def _until_ready(port: int, process: subprocess.Popen[bytes], log: Path) -> float:
    """Poll the first answer to /v1/models; for llama.cpp too, which has no /health there."""
    async with aiohttp.ClientSession() as session:
        for _ in range(2400):
            if process.poll() is not None:
                sys.exit(f"the server ended with {process.returncode}; see {log}")
            try:
                async with session.get(f"http://127.0.0.1:{port}/v1/models") as answer:
                    if answer.status == 200:
                        return time.monotonic()
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.1)
    sys.exit(f"not ready after 240 s; see {log}")


async def _measure(port: int, levels: list[int], tokens: int) -> dict[int, Load]:
    timeout = aiohttp.ClientTimeout(total=None)
    # A connection per request: one of the contenders closes those that were idle for a moment.
    connections = aiohttp.TCPConnector(limit=0, force_close=True)
    url = f"http://127.0.0.1:{port}"
    async with aiohttp.ClientSession(url, timeout=timeout, connector=connections) as session:
        async with session.get("/v1/models") as answer:
            model = (await answer.json())["data"][0]["id"]
        words = random.Random(0)
        await asyncio.gather(*(stream(session, model, words, 16) for _ in range(2)))
        return {
            level: await loop(
                session, model, random.Random(level), (level, 4 if level == 1 else 2, tokens)
            )
            for level in levels
        }


async def loop(
    session: aiohttp.ClientSession, model: str, words: random.Random, work: tuple[int, int, int]
) -> Load:
    """Streams that ask again as soon as they are answered; `work`: streams, requests of each,
    tokens of each request."""
    level, rounds, tokens = work

    async def one_client() -> list[list[float]]:
        return [await stream(session, model, words, tokens) for _ in range(rounds)]

    started = time.monotonic()
    answers = [
        times
        for client in await asyncio.gather(*(one_client() for _ in range(level)))
        for times in client
    ]
    elapsed = time.monotonic() - started
    produced = sum(len(times) - 1 for times in answers)
    gaps = [b - a for times in answers for a, b in pairwise(times[1:])]
    first = statistics.median(times[1] - times[0] for times in answers)
    return Load(produced / elapsed, first, statistics.median(gaps))


async def stream(
    session: aiohttp.ClientSession, model: str, words: random.Random, tokens: int
) -> list[float]:
    """The send time, then the arrival time of every chunk that carries text."""
    body = {
        "model": model,
        "prompt": " ".join(words.choices(WORDS, k=64)),
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    times = [time.monotonic()]
    async with session.post("/v1/completions", json=body) as answer:
        if answer.status != 200:
            sys.exit(f"{answer.status}: {await answer.text()}")
        async for _ in _chunks(answer):
            times.append(time.monotonic())
    return times


async def _chunks(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    async for line in answer.content:
        if line.startswith(b"data: {") and b'"choices"' in line:
            yield line


def _line(name: str, rows: dict[str, tuple[float, dict[int, Load]]], levels: list[int]) -> None:
    """One contender's row of the table, under a heading when it is the first."""
    if len(rows) == 1:
        heads = [f" | c={level:<2} tok/s  ratio  TTFT ms   ITL ms" for level in levels]
        print(f"{'server':14} {'ready':>6}" + "".join(heads))
    base = rows[BASELINE][1] if BASELINE in rows else None
    ready_s, loads = rows[name]
    line = f"{name:14} {ready_s:5.1f}s"
    for level in levels:
        load = loads[level]
        ratio = f"{load.tokens_per_s / base[level].tokens_per_s:5.2f}x" if base else "     -"
        latency = f"{load.ttft_s * 1e3:8.0f} {load.itl_s * 1e3:8.1f}"
        line += f" | {load.tokens_per_s:9.1f} {ratio} {latency}"
    print(line, flush=True)


if __name__ == "__main__":
    main()
