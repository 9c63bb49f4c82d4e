"""One request's passage through the server: the alias it asked for and the version it holds.

vLLM resolves a model name several times per request, and a swap may fall between two of them. The
turn remembers the first answer, so a request sees one version from its first check to its last
token. It lives in a context variable: no body is parsed twice for it.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from contextvars import ContextVar
from dataclasses import dataclass, field
from uuid import uuid4

from serve.adapters.pool import Version
from serve.errors import ServeError

REMEMBERED = 20_000  # requests whose alias is kept for the engine's closing statistics


@dataclass(slots=True)
class Turn:
    id: str = field(default_factory=lambda: uuid4().hex)
    began: float = field(default_factory=time.monotonic)
    alias: str = ""  # "" until vLLM has found the model
    version: Version | None = None
    caller: str = ""  # the name of the key, for the history of what it changes
    session: str = ""  # what its headers say of whom it is for
    user: str = ""  # what its body says, as vLLM has read it
    opening: str = ""  # how its conversation begins
    fault: ServeError | None = None  # why it gets no answer, where vLLM would say it worse

    @property
    def identity(self) -> str:
        """Whom the answer is for. Many may share a key: where nobody is named, those who go on
        with one conversation are one; a stranger without any is somebody else every time."""
        talk = f"{self.caller}\0{self.opening}" if self.opening else self.caller
        return self.session or self.user or talk or self.id


current: ContextVar[Turn | None] = ContextVar("turn", default=None)


class Ledger:
    """Engine request id -> alias; bounded, oldest forgotten first."""

    def __init__(self) -> None:
        self._aliases: OrderedDict[str, str] = OrderedDict()

    def note(self, request_id: str, alias: str) -> None:
        self._aliases[request_id] = alias
        while len(self._aliases) > REMEMBERED:
            self._aliases.popitem(last=False)

    def settle(self, request_id: str | None) -> str | None:
        """The alias of a finished request; forgets it."""
        return self._aliases.pop(request_id, None) if request_id else None


ledger = Ledger()
