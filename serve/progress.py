"""Turns a starting vLLM's log into a line per stage, and remembers why it failed.

Passes on what an operator must see (errors and tracebacks) and drops the rest, vLLM's many warnings
about flags we chose among it; `verbose` passes on everything.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable

# Words of vLLM 0.32's log -> what is being waited for. A word that changes costs a line, no more.
STAGES = (
    ("Resolved architecture", "configuring the engine"),
    ("Starting to load model", "loading weights"),
    ("Explicitly set", "allocating the KV cache"),
    ("Starting vLLM server", "starting the API"),
)
QUIET = re.compile(r"\b(INFO|DEBUG|WARNING)\b|Loading safetensors|^\s*$|^\[?W\d{4} ")
CAUSE = re.compile(r"(?:^|\s)((?:[\w.]*\.)?\w*(?:Error|Exception|Refused)): (.+)$")
EFFECTS = ("Engine core initialization failed", "EngineDeadError", "cancelled")


class Progress:
    """One worker's output. `reason` is the first cause of failure it named, if any."""

    def __init__(self, say: Callable[[str], None], *, verbose: bool) -> None:
        self._say, self._verbose = say, verbose
        self._began = time.monotonic()
        self._stages = list(STAGES)
        self.reason = ""

    async def follow(self, stream: asyncio.StreamReader) -> None:
        """Read until the worker has closed its output."""
        self._say("waiting for: importing vLLM")
        while raw := await stream.readline():
            self.line(raw.decode(errors="replace").rstrip())

    def line(self, text: str) -> None:
        for mark, stage in self._stages:
            if mark in text:
                self._stages.remove((mark, stage))
                self._say(f"waiting for: {stage} ({time.monotonic() - self._began:.1f} s)")
                break
        cause = CAUSE.search(text)
        if cause and not self.reason and not any(effect in text for effect in EFFECTS):
            self.reason = f"{cause[1]}: {cause[2]}"
        if self._verbose or not QUIET.search(text):
            self._say(text)
