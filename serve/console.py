"""What the parent says, on stderr, without ever waiting for whoever reads that.

A terminal that was stopped, a full disk or a log collector that hangs would else hold up the
parent, and with it every answer it gives.
"""

from __future__ import annotations

import queue
import sys
import threading
from contextlib import suppress

LINES = 10_000  # kept for a reader that is slow; what comes on top is counted and dropped
FLUSH_S = 2.0


class Console:
    """Lines of the server's own log, written by a thread."""

    def __init__(self) -> None:
        self._lines: queue.Queue[str | None] = queue.Queue(LINES)
        self._dropped = 0
        self._writer = threading.Thread(target=self._write, name="console", daemon=True)
        self._writer.start()

    def say(self, text: str) -> None:
        if self._dropped:
            text = f"({self._dropped} lines were dropped: nobody read them)\nquantserve: {text}"
        try:
            self._lines.put_nowait(f"quantserve: {text}\n")
            self._dropped = 0
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Write what is left, as far as somebody reads it."""
        with suppress(queue.Full):
            self._lines.put_nowait(None)
        self._writer.join(FLUSH_S)

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            with suppress(OSError, ValueError):  # a full disk, a reader that is gone
                sys.stderr.write(line)
                sys.stderr.flush()
