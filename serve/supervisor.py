"""The parent: owns the listening socket, starts the worker on it, watches it, restarts it.

Imports neither torch nor vLLM: it answers within a second of being started and keeps answering
while a worker loads or has died, on the same socket and in OpenAI's error shape. It stops
accepting the moment a worker says that its app has started. Nothing it starts outlives it: the
worker has its own session, which is killed as a group, and dies with the parent in any case
(serve.lifeline).
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from serve import engine_args, waiting_room
from serve.errors import SettingsError
from serve.progress import Progress
from serve.settings import Settings

logger = logging.getLogger(__name__)

RESTART_PAUSES_S = (0.5, 1, 2, 5, 10, 30)
STEADY_S = 60.0  # a worker that served this long has earned a fresh row of pauses
PROBE_EVERY_S = 5.0
PROBE_TIMEOUT_S = 120.0  # a long prefill holds the engine's answers back; a hang holds them longer
STOP_GRACE_S = 10.0  # after the drain, for the worker to let go of its sockets


@dataclass
class Worker:
    """A started worker process; `ready` is set when its app has started."""

    process: asyncio.subprocess.Process
    output: asyncio.StreamReader
    ready: asyncio.Event
    started: float

    def signal(self, sign: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            self.process.send_signal(sign)

    def kill_group(self) -> None:
        """The worker, its fork server and every engine process."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


class Supervisor:
    """Keeps one worker alive on one socket until told to stop."""

    def __init__(self, settings: Settings, say: Callable[[str], None], *, verbose: bool) -> None:
        self._settings, self._say, self._verbose = settings, say, verbose
        self._facts = engine_args.inspect(settings)
        self._stop = asyncio.Event()
        self._served_once = False

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT. Returns the exit code: 2 when the first start failed."""
        listener = bind(self._settings.host, self._settings.port)
        for line in self._facts.parsers.told():
            self._say(line)
        loop = asyncio.get_running_loop()
        for sign in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sign, self._on_signal)
        failures = 0
        while not self._stop.is_set():
            served_s, reason = await self._one_worker(listener)
            if self._stop.is_set():
                break
            if not self._served_once:
                self._say(f"the engine did not start: {reason}")
                return 2
            failures = 0 if served_s > STEADY_S else failures + 1
            pause = RESTART_PAUSES_S[min(failures, len(RESTART_PAUSES_S) - 1)]
            self._say(f"the worker ended ({reason}); starting another in {pause:g} s")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), pause)
        listener.close()
        return 0

    def _on_signal(self) -> None:
        """The first signal drains; the second kills what is left."""
        if self._stop.is_set():
            self._settings = self._settings.model_copy(update={"drain_timeout": 0.0})
            self._forced.set()
        self._stop.set()

    async def _one_worker(self, listener: socket.socket) -> tuple[float, str]:
        """From start to end of one worker: seconds it served, and why it ended."""
        self._forced = asyncio.Event()
        progress = Progress(self._say, verbose=self._verbose)
        room = await waiting_room.open_on(listener)
        worker = await self._start(listener)
        output = asyncio.create_task(progress.follow(worker.output))
        ended = asyncio.create_task(worker.process.wait())
        stop = asyncio.create_task(self._stop.wait())
        ready = asyncio.create_task(worker.ready.wait())
        try:
            await asyncio.wait({ready, ended, stop}, return_when=asyncio.FIRST_COMPLETED)
            if worker.ready.is_set():
                room.close()
                self._announce(worker)
                probe = asyncio.create_task(self._probe())
                await asyncio.wait({ended, stop, probe}, return_when=asyncio.FIRST_COMPLETED)
                probe.cancel()
            if self._stop.is_set():
                await self._drain(worker, ended)
        finally:
            worker.kill_group()
            await ended
            await output
            room.close()
            for task in (stop, ready):
                task.cancel()
        served_s = time.monotonic() - worker.started if worker.ready.is_set() else 0.0
        return served_s, progress.reason or f"exit status {worker.process.returncode}"

    async def _start(self, listener: socket.socket) -> Worker:
        # Pipes of our own: asyncio's would let `wait` sleep until the worker's own children, which
        # inherit its output, have ended as well.
        read_fd, write_fd = os.pipe()
        output_fd, output_end = os.pipe()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "serve.worker",
            str(listener.fileno()), str(write_fd), str(os.getpid()),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output_end,
            stderr=output_end,
            env=engine_args.environment(self._settings, self._facts),
            pass_fds=(listener.fileno(), write_fd),
            start_new_session=True,
        )  # fmt: skip
        os.close(write_fd)
        os.close(output_end)
        worker = Worker(process, await _lines(output_fd), asyncio.Event(), time.monotonic())
        loop = asyncio.get_running_loop()

        def told() -> None:
            loop.remove_reader(read_fd)
            if os.read(read_fd, 16):
                worker.ready.set()
            os.close(read_fd)

        loop.add_reader(read_fd, told)
        return worker

    def _announce(self, worker: Worker) -> None:
        took = time.monotonic() - worker.started
        where = f"http://{self._settings.host}:{self._settings.port}"
        self._served_once = True
        self._say(f"ready after {took:.1f} s: {where}/v1 (metrics at {where}/metrics)")

    async def _probe(self) -> None:
        """Returns when the worker has not been ready for too long: it hangs."""
        last_good = time.monotonic()
        while time.monotonic() - last_good < PROBE_TIMEOUT_S:
            await asyncio.sleep(PROBE_EVERY_S)
            if await waiting_room.answers(self._settings.host, self._settings.port, "/readyz"):
                last_good = time.monotonic()
        self._say(f"the worker has not been ready for {PROBE_TIMEOUT_S:g} s; killing it")

    async def _drain(self, worker: Worker, ended: asyncio.Task[int]) -> None:
        """New requests are refused at once, running ones get `drain_timeout` seconds."""
        if worker.ready.is_set():
            self._say(f"draining: up to {self._settings.drain_timeout:g} s for running requests")
            worker.signal(signal.SIGUSR1)
        worker.signal(signal.SIGTERM)
        forced = asyncio.create_task(self._forced.wait())
        limit = self._settings.drain_timeout + STOP_GRACE_S
        await asyncio.wait({ended, forced}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        forced.cancel()


async def _lines(fd: int) -> asyncio.StreamReader:
    """What is written into the other end of a pipe; closes `fd` at its end."""
    reader = asyncio.StreamReader(limit=1 << 20)
    protocol = asyncio.StreamReaderProtocol(reader)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, os.fdopen(fd, "rb"))
    return reader


def bind(host: str, port: int) -> socket.socket:
    """A listening, inheritable socket. SettingsError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as fault:
        listener.close()
        raise SettingsError(f"cannot listen on {host}:{port}: {fault.strerror}") from fault
    listener.listen(2048)
    listener.setblocking(False)  # noqa: FBT003 - the socket API
    listener.set_inheritable(True)
    return listener
