"""The line between the parent and its worker: beats come up, orders go down.

A beat tells what only the worker's event loop knows: a loop that is blocked, stopped or gone sends
none. Nothing here waits: who does not read misses beats, and nobody is held up by that.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass

BEAT_EVERY_S = 0.1
ORDER_BYTES = 256
_PACKED = struct.Struct("<???QQ")

# What a parent can say: how often a worker ended before, and why; the socket is the worker's alone;
# admit nothing new; end open answers (for which reason); read the key file again; the engine stands
# still, or goes on.
ORDERS = ("past", "yours", "drain", "end", "reload", "stalled", "moving")


@dataclass(frozen=True, slots=True)
class Beat:
    """What a worker says of itself."""

    accepts: bool  # connections, on the parent's socket
    engine_dead: bool
    drained: bool  # it was told to admit nobody
    open: int  # answers that have not ended
    steps: int  # how often the engine has come round its loop

    def packed(self) -> bytes:
        return _PACKED.pack(*astuple(self))


class EngineSteps:
    """How often the engine of this process was seen to come round its loop."""

    def __init__(self) -> None:
        self.count = 0

    def seen(self) -> None:
        self.count += 1

    async def ask(self, question: Callable[[], Awaitable[object]], every_s: float) -> None:
        """Ask it anything, again and again: an idle engine takes no step but still answers."""
        while True:
            await asyncio.sleep(every_s)
            answer = await asyncio.gather(question(), return_exceptions=True)
            if not isinstance(answer[0], BaseException):
                self.seen()


engine_steps = EngineSteps()


class Heart:
    """The worker's end: sends `look()` for ever, and carries out orders.

    An order is a word of ORDERS and its arguments.
    """

    def __init__(
        self, fd: int, look: Callable[[], Beat], orders: Mapping[str, Callable[..., object]]
    ) -> None:
        self._socket, self._look, self._orders = socket.socket(fileno=fd), look, orders
        self._next: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin; the running loop does the rest."""
        self._socket.setblocking(False)  # noqa: FBT003 - the socket API
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._obey)
        self._go_on()

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        if self._next is not None:
            self._next.cancel()
        self._socket.close()

    def beat(self) -> None:
        """Send one."""
        with suppress(OSError):  # a parent that is stopped reads nothing; one that is gone ends us
            self._socket.send(self._look().packed())

    def _go_on(self) -> None:
        self.beat()
        self._next = asyncio.get_running_loop().call_later(BEAT_EVERY_S, self._go_on)

    def _obey(self) -> None:
        word, *given = self._socket.recv(ORDER_BYTES).decode().split() or [""]
        if not word:  # the parent has closed its end
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
        elif order := self._orders.get(word):
            order(*given)


class Pulse:
    """The parent's end: `beat` is the last one heard, None before the first and after the end."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)  # noqa: FBT003 - the socket API
        self._socket = end
        self.beat: Beat | None = None
        self.last: Beat | None = None  # which stays
        self.heard = 0.0
        self.accepted: float | None = None  # since when it takes connections
        asyncio.get_running_loop().add_reader(end.fileno(), self._hear)

    def order(self, *words: str) -> None:
        """Ask for something; lost where the worker has ended or does not read."""
        with suppress(OSError):
            self._socket.send(" ".join(words).encode())

    def late(self, seconds: float) -> bool:
        """Whether the last beat is older than that, or there was none."""
        return self.beat is None or time.monotonic() - self.heard > seconds

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()

    def _hear(self) -> None:
        try:
            packet = self._socket.recv(_PACKED.size)
        except OSError:
            packet = b""
        if len(packet) == _PACKED.size:
            self.beat = self.last = Beat(*_PACKED.unpack(packet))
            self.heard = time.monotonic()
            if self.beat.accepts and self.accepted is None:
                self.accepted = self.heard
        elif not packet:  # the worker has closed its end: it is gone
            self.beat = None
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
