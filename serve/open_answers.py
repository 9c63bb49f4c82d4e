"""The answers that have not ended, so that a worker about to end can tell every client of it.

A client whose stream just stops cannot know whether that was all; here it gets an error event, and
who has had nothing yet a 503 that may be tried again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from serve.errors import ServeError


class Endable(Protocol):
    """An answer (serve.answer)."""

    async def end(self, fault: ServeError) -> None: ...


class OpenAnswers:
    """Those of this worker."""

    def __init__(self) -> None:
        self._open: set[Endable] = set()

    def __len__(self) -> int:
        return len(self._open)

    @contextmanager
    def holding(self, answer: Endable) -> Iterator[None]:
        """While its request is worked on."""
        self._open.add(answer)
        try:
            yield
        finally:
            self._open.discard(answer)

    async def end_all(self, fault: ServeError) -> None:
        """Tell every client `fault`. A client that does not read holds up nobody but this call."""
        told = (self._end(answer, fault) for answer in list(self._open))
        await asyncio.gather(*told, return_exceptions=True)

    async def _end(self, answer: Endable, fault: ServeError) -> None:
        await answer.end(fault)
        self._open.discard(answer)
