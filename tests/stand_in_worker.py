"""A worker without vLLM: HTTP on the inherited socket, the real heartbeat, an engine that answers.

Does what it is asked for by path (`/do/...`), and at its start what the files in $STAND_IN say:
`load` (seconds, or `hang`), `dies` (a last line).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from serve import lifeline, listening, settings
from serve.heartbeat import ORDERS, Beat, Heart

ENGINE = """
import sys, time
for line in sys.stdin:
    end = time.process_time() + float(line)
    while time.process_time() < end: pass
    print(flush=True)
"""


class StandIn:
    def __init__(self, line_fd: int) -> None:
        self.line_fd = line_fd
        self.engine = subprocess.Popen(
            [sys.executable, "-c", ENGINE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        assert self.engine.stdin and self.engine.stdout
        self.questions, self.answers = self.engine.stdin, self.engine.stdout
        self.step_s, self.steps, self.open = 0.0, 0, 0
        self.status, self.ended, self.orders = "loading", asyncio.Event(), list[str]()

    async def serve(self, listener: socket.socket) -> None:
        chosen = settings.load()
        encryption = listening.encryption(chosen)
        loop = asyncio.get_running_loop()
        loop.add_reader(self.answers, self.step)
        self.step()
        loop.add_signal_handler(signal.SIGTERM, lambda: os._exit(0))
        orders = {word: lambda *given, w=word: self.obey(w, *given)
                  for word in ORDERS}  # fmt: skip
        await asyncio.start_server(self.answer, sock=listener, ssl=encryption)
        Heart(self.line_fd, self.beat, orders).start()
        await asyncio.Event().wait()

    def step(self) -> None:
        if self.steps:
            os.read(self.answers.fileno(), 10)
        self.steps += 1
        wait = 0 if self.step_s else 0.05
        asyncio.get_running_loop().call_later(wait, self.ask)

    def ask(self) -> None:
        with suppress(BrokenPipeError):
            self.questions.write(f"{self.step_s}\n".encode())
        self.step_s = 0

    def beat(self) -> Beat:
        dead = self.engine.poll() is not None
        if dead:
            self.obey("end", "engine_died")
        drained = "drain" in self.orders
        return Beat(
            accepts=True, engine_dead=dead, drained=drained, open=self.open, steps=self.steps
        )

    def obey(self, word: str, *given: str) -> None:
        self.orders.append(" ".join((word, *given)))
        if word in ("drain", "stalled", "moving", "yours"):
            self.status = {"yours": "ready", "moving": "ready"}.get(word, word)
            self.status = "drain" if "drain" in self.orders else self.status
        if word == "end":
            self.ended.set()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        path = head.split()[1].decode()
        status = "503 no" if path in ("/readyz", "/health") and self.status != "ready" else "200 OK"
        if path.startswith("/do/stream"):
            writer.write(f"HTTP/1.1 {status}\r\nConnection: close\r\n\r\n".encode())
            await self.stream(writer, path.rpartition("/")[2])
        else:
            told = {"pid": os.getpid(), "engine": self.engine.pid, "orders": self.orders}
            body = json.dumps(told | {"status": self.status}).encode()
            writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode())
            writer.write(body)
            await writer.drain()
            self.do(*path.split("/")[2:])
        writer.close()

    async def stream(self, writer: asyncio.StreamWriter, name: str) -> None:
        """Events until it is told to end, or the file of that name is there."""
        self.open += 1
        try:
            while not self.ended.is_set() and name not in os.listdir(os.environ["STAND_IN"]):
                writer.write(b"data: token\n\n")
                await writer.drain()
                await asyncio.sleep(0.02)
            writer.write(f"data: {'error' if self.ended.is_set() else '[DONE]'}\n\n".encode())
            await writer.drain()
        finally:
            self.open -= 1

    def do(self, what: str = "", amount: str = "") -> None:
        if what == "block":  # the loop, without computing
            time.sleep(float(amount))
        elif what == "parse":  # the loop, computing
            end = time.process_time() + float(amount)
            while time.process_time() < end:
                pass
        elif what == "compute":  # one long step of the engine
            self.step_s = float(amount)
        elif what == "drain":
            self.obey("drain")
        elif what == "say":
            sys.stdout.buffer.write(Path(os.environ["STAND_IN"], "say").read_bytes())
            sys.stdout.flush()
        elif what == "die":
            os._exit(3)


def main() -> None:
    socket_fd, line_fd, parent = map(int, sys.argv[1:4])
    lifeline.die_with(parent)
    files = [Path(os.environ["STAND_IN"], name) for name in ("load", "dies")]
    told = {file.name: file.read_text() for file in files if file.exists()}
    while told.get("load") == "hang":
        time.sleep(60)
    time.sleep(float(told.get("load", 0)))
    if "dies" in told:
        sys.exit(told["dies"])
    listener = socket.socket(fileno=socket_fd)
    asyncio.run(StandIn(line_fd).serve(listener))


if __name__ == "__main__":
    main()
