"""A worker as a process: started on the parent's socket, listened to, signalled, ended with all of
its own.

Has its own session, which is killed as a group, and dies with the parent in any case
(serve.lifeline).
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress

from serve.heartbeat import BEAT_EVERY_S, Pulse
from serve.progress import Progress

POLL_S = 0.02
LAST_WORDS_S = 1.0  # for what it had written; a child that got away may hold its output open


class WorkerProcess:
    """Made by `start`; `progress` is its log, `pulse` the line to it."""

    def __init__(
        self, process: subprocess.Popen[bytes], pulse: Pulse, progress: Progress, output_fd: int
    ) -> None:
        self._process, self.pulse, self.progress = process, pulse, progress
        self.started = time.monotonic()
        self._stalled = self._alone = False
        self._reading = asyncio.create_task(_read(output_fd, progress))

    @classmethod
    def start(
        cls,
        command: Sequence[str],
        listener: socket.socket,
        env: Mapping[str, str],
        progress: Progress,
    ) -> WorkerProcess:
        """Run `command SOCKET_FD LINE_FD PARENT_PID`. OSError when there is no more to be had."""
        # A pipe of our own: its children inherit its output, and a reader of theirs would wait for
        # them too.
        with ExitStack() as failed:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            failed.callback(ours.close)
            with theirs:
                output_fd, output_end = os.pipe()
                failed.callback(os.close, output_fd)
                try:
                    process = subprocess.Popen(
                        [*command, *map(str, (listener.fileno(), theirs.fileno(), os.getpid()))],
                        stdin=subprocess.DEVNULL,
                        stdout=output_end,
                        stderr=output_end,
                        env=env,
                        pass_fds=(listener.fileno(), theirs.fileno()),
                        start_new_session=True,
                    )
                finally:
                    os.close(output_end)
            failed.pop_all()
        return cls(process, Pulse(ours), progress, output_fd)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def ready_at(self) -> float | None:
        """When it first took connections (time.monotonic), if it has."""
        return self.pulse.accepted

    @property
    def accepts(self) -> bool:
        """Whether it takes connections, as far as it has said."""
        beat = self.pulse.beat
        return beat is not None and beat.accepts and not beat.engine_dead

    @property
    def serves(self) -> bool:
        """Whether it is there for requests, though maybe not at this moment."""
        beat = self.pulse.beat
        return self.ready_at is not None and beat is not None and not beat.engine_dead

    def quiet_since(self, ordered: float) -> bool:
        """Whether no client waits for it any more, by a beat after an order of that time."""
        beat, heard = self.pulse.beat, self.pulse.heard
        if not self.alive or beat is None:
            return True
        return heard > ordered + BEAT_EVERY_S and beat.open == 0

    @property
    def status(self) -> str:
        """How it ended, once it has."""
        code = self._process.returncode
        if code is not None and code < 0:
            return f"killed by signal {-code}, {signal.strsignal(-code)}"
        return f"exit status {code}"

    @property
    def killed(self) -> bool:
        """Whether somebody killed it, as the kernel does when memory is short."""
        return self._process.returncode == -signal.SIGKILL

    def served_s(self) -> float:
        """Seconds since it was ready; 0 when it never was."""
        return time.monotonic() - self.ready_at if self.ready_at is not None else 0.0

    def tell_alone(self) -> None:
        """That nobody else answers on the socket: only then does it say that it is ready."""
        if not self._alone:
            self._alone = True
            self.pulse.order("yours")

    def tell_stalled(self, *, stalled: bool) -> None:
        """That its engine stands still, or does not any more."""
        if stalled != self._stalled:
            self._stalled = stalled
            self.pulse.order("stalled" if stalled else "moving")

    def terminate(self) -> None:
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """The worker, its fork server and every engine process."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    async def ended(self) -> None:
        """Wait until it has, and its log is read; call `kill` before, or wait for long."""
        while self.alive:  # noqa: ASYNC110 - the kernel sets no event
            await asyncio.sleep(POLL_S)
        await asyncio.wait({self._reading}, timeout=LAST_WORDS_S)
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        self.pulse.close()


async def _read(fd: int, progress: Progress) -> None:
    """Follow what is written into the other end of a pipe; closes `fd`."""
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    pipe = os.fdopen(fd, "rb")
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, pipe)
    try:
        await progress.follow(reader)
    finally:
        transport.close()
