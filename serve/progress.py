"""Turns a worker's log into lines an operator must see, and remembers what went wrong of late.

Passes on errors and tracebacks, a line per stage of the start, and drops the rest, vLLM's many
warnings about flags we chose among it; `verbose` passes on everything. Takes any bytes: a line may
be of any length, in any encoding, and need not end.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import Callable

# Words of vLLM 0.32's log -> what is being waited for. A word that changes costs a line, no more.
STAGES = (
    ("Resolved architecture", "configuring the engine"),
    ("Starting to load model", "loading weights"),
    ("Explicitly set", "allocating the KV cache"),
    ("Starting vLLM server", "starting the API"),
)
# What it computes with, and an operator would not think of.
NOTES = {
    "Using Transformers modeling backend": "vLLM has no code of its own for this model, and runs"
    " that of transformers in its Transformers backend",
}
QUIET = re.compile(r"\b(INFO|DEBUG|WARNING)\b|Loading safetensors|^\s*$|^\[?W\d{4} ")
CAUSE = re.compile(r"(?:^|\s)(?:[\w.]*\.)?(\w*(?:Error|Exception|Refused)): (.+)$")
REFUSAL = "SettingsError: "  # of our own worker's: an operator's mistake, in one line
EFFECTS = ("Engine core initialization failed", "EngineDeadError", "cancelled")

LINE_BYTES = 8 << 10  # a longer line is cut there
CHUNK_BYTES = 64 << 10
CAUSES = 200  # remembered


class Progress:
    """One worker's output; `logged` is when it last wrote anything (time.monotonic)."""

    def __init__(self, say: Callable[[str], None], *, verbose: bool) -> None:
        self._say, self._verbose = say, verbose
        self._began = self.logged = time.monotonic()
        self._stages, self._notes = list(STAGES), dict(NOTES)
        self._line = b""  # what has come of it, and how long it is by now
        self._length = 0
        self._causes: deque[tuple[float, str]] = deque(maxlen=CAUSES)

    async def follow(self, stream: asyncio.StreamReader) -> None:
        """Read until the worker has closed its output."""
        self._say("waiting for: importing vLLM")
        while chunk := await stream.read(CHUNK_BYTES):
            self.feed(chunk)
        self.feed(b"\n")

    def feed(self, chunk: bytes) -> None:
        """Some bytes of the output, wherever they begin and end."""
        self.logged = time.monotonic()
        *ended, rest = chunk.split(b"\n")
        for piece in ended:
            self._grow(piece)
            self.line(self._text())
            self._line, self._length = b"", 0
        self._grow(rest)

    def line(self, text: str) -> None:
        if text.startswith(REFUSAL):  # the last line, which says how the start ended, has it
            self._causes.append((time.monotonic(), text.removeprefix(REFUSAL)))
            return
        for mark, stage in self._stages:
            if mark in text:
                self._stages.remove((mark, stage))
                self._say(f"waiting for: {stage} ({time.monotonic() - self._began:.1f} s)")
                break
        for mark in [mark for mark in self._notes if mark in text]:
            self._say(self._notes.pop(mark))
        cause = CAUSE.search(text)
        if cause and not any(effect in text for effect in EFFECTS):
            self._causes.append((time.monotonic(), f"{cause[1]}: {cause[2]}"))
        if self._verbose or not QUIET.search(text):
            self._say(text)

    def cause(self, since: float) -> str:
        """The first cause of failure that was logged since then, or an empty string."""
        return next((told for at, told in self._causes if at >= since), "")

    def _grow(self, piece: bytes) -> None:
        self._line += piece[: LINE_BYTES - len(self._line)]
        self._length += len(piece)

    def _text(self) -> str:
        text = self._line.decode(errors="replace").rstrip()
        cut = self._length - len(self._line)
        return f"{text} ... ({cut} more bytes)" if cut else text
