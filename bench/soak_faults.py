"""What `bench.soak` does to a server, a fault each: kills, stops, full disks, floods."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

LOCKED_S, FULL_S, GARBAGE_S, FLOOD_S = 8.0, 10.0, 10.0, 20.0
UNNOTICED_S = 10.0  # that a server may go on saying it is ready after a kill
STOPPED_S = 60.0  # a stopped process that nobody has found by then is let go on
CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Target:
    """The server to hurt: its parent process, its port and the folder of its state."""

    server: psutil.Process
    port: int
    state: Path

    @property
    def registry(self) -> Path:
        return self.state / "registry.sqlite"

    def child(self, named: str) -> psutil.Process | None:
        """The process of its tree whose command line has `named`."""
        for process in self.server.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if named in " ".join(process.cmdline()):
                    return process
        return None


@dataclass(frozen=True, slots=True)
class Fault:
    """`strike` returns when the fault is over, with what was seen of it."""

    name: str
    strike: Callable[[Target], Awaitable[str]]
    kills_api: bool = False


def _is_ready(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return b" 200 " in connection.recv(4096).split(b"\r\n")[0]
    return False


def _kill(named: str) -> Callable[[Target], Awaitable[str]]:
    async def strike(target: Target) -> str:
        victim = target.child(named)
        if victim is None:
            return "it was not running"
        began = time.monotonic()
        victim.kill()
        while await asyncio.to_thread(_is_ready, target.port):
            if time.monotonic() - began > UNNOTICED_S:
                return f"not noticed in {UNNOTICED_S:g} s"
            await asyncio.sleep(0.02)
        return f"noticed after {time.monotonic() - began:.2f} s"

    return strike


def _stop(named: str) -> Callable[[Target], Awaitable[str]]:
    """SIGSTOP, until somebody has ended the victim."""

    async def strike(target: Target) -> str:
        victim = target.child(named)
        if victim is None:
            return "it was not running"
        began = time.monotonic()
        victim.send_signal(signal.SIGSTOP)
        while time.monotonic() - began < STOPPED_S:
            if not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE:
                return f"found after {time.monotonic() - began:.1f} s"
            await asyncio.sleep(0.1)
        victim.send_signal(signal.SIGCONT)
        return f"not found in {STOPPED_S:g} s"

    return strike


async def _lock_registry(target: Target) -> str:
    with sqlite3.connect(target.registry, isolation_level=None) as connection:
        connection.execute("BEGIN IMMEDIATE")
        await asyncio.sleep(LOCKED_S)
        connection.execute("ROLLBACK")
    connection.close()
    return f"write lock held for {LOCKED_S:g} s"


async def _garble_registry(target: Target) -> str:
    """Overwritten; then the operator's commands, as the manual has them."""
    size = target.registry.stat().st_size
    with target.registry.open("r+b") as file:
        file.write(secrets.token_bytes(size))
    await asyncio.sleep(GARBAGE_S)
    command = [str(Path(sys.executable).with_name("quantserve")), "registry"]
    said = []
    for what in (["check"], ["restore", "--yes"]):
        done = await asyncio.to_thread(
            subprocess.run, [*command, *what, "--state-dir", str(target.state)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        said.append(f"`registry {what[0]}`: status {done.returncode}")
    return ", ".join(said)


async def _fill_disk(target: Target) -> str:
    """The file system of the state folder, which is a small one of its own."""
    filler = target.state / "filler"
    with filler.open("wb") as file, suppress(OSError):
        while True:
            file.write(bytes(CHUNK))
    await asyncio.sleep(FULL_S)
    filler.unlink()
    return f"no byte free for {FULL_S:g} s"


async def _log_two_megabytes(target: Target) -> str:
    """One line, from the worker's own standard error."""
    worker = target.child("serve.worker")
    if worker is None:
        return "no worker was running"

    def write() -> None:
        with open(f"/proc/{worker.pid}/fd/2", "wb", buffering=0) as pipe:
            pipe.write(b"ERROR " + b"x" * (2 << 20) + b"\n")

    began = time.monotonic()
    await asyncio.to_thread(write)
    return f"taken in {time.monotonic() - began:.2f} s"


async def _post_64_megabytes(target: Target) -> str:
    body = b'{"model": "base", "max_tokens": 1, "prompt": "' + b"a" * (64 << 20) + b'"}'
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: soak\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    return await asyncio.to_thread(_flood, target.port, head, iter([body]))


async def _endless_url(target: Target) -> str:
    def more() -> bytes:
        return b"a" * CHUNK

    return await asyncio.to_thread(_flood, target.port, b"GET /", iter(more, b""))


def _flood(port: int, head: bytes, rest: Iterator[bytes]) -> str:
    """Send until answered, cut off, or FLOOD_S are over; the first line of the answer."""
    sent, end = 0, time.monotonic() + FLOOD_S
    with socket.create_connection(("127.0.0.1", port), timeout=FLOOD_S) as connection:
        try:
            connection.sendall(head)
            for piece in rest:
                for at in range(0, len(piece), CHUNK):
                    connection.sendall(piece[at : at + CHUNK])
                    sent += CHUNK
                    if time.monotonic() > end:
                        return f"took {sent >> 20} MiB in {FLOOD_S:g} s"
        except OSError:
            pass  # it does not read on: perhaps it has answered
        try:
            line = connection.recv(4096).split(b"\r\n")[0].decode("latin-1")
        except OSError as fault:
            line = type(fault).__name__
    return f"{line or 'closed'} after {sent >> 20} MiB"


FAULTS = (
    Fault("kill -9 of the engine", _kill("EngineCore")),
    Fault("registry locked", _lock_registry),
    Fault("SIGSTOP of the engine", _stop("EngineCore")),
    Fault("64 MB body", _post_64_megabytes),
    Fault("kill -9 of the worker", _kill("serve.worker"), kills_api=True),
    Fault("URL without end", _endless_url),
    Fault("registry overwritten with garbage", _garble_registry),
    Fault("SIGSTOP of the worker", _stop("serve.worker"), kills_api=True),
    Fault("log line of 2 MB", _log_two_megabytes),
    Fault("disk full", _fill_disk),
)


def small_disk(folder: Path, mib: int) -> bool:
    """A file system of its own at `folder`, where this user may mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.geteuid():
        return False
    command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "-l", str(folder)], check=False)
