"""One request's passage through the server: the alias it asked for and the version it holds.

vLLM resolves a model name several times per request, and a swap may fall between two of them. The
turn remembers the first answer, so a request sees one version from its first check to its last
token. It lives in a context variable: no body is parsed twice for it.
"""

from __future__ import annotations

import re
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from uuid import uuid4

from serve.adapters.pool import Version
from serve.errors import ServeError

ID_LENGTH = 128
_ID = re.compile(r"[^A-Za-z0-9._:+/=@-]")


@dataclass(slots=True)
class Turn:
    id: str = field(default_factory=lambda: uuid4().hex)  # in our log and in vLLM's
    request_id: str = ""  # what the client calls it; `id` begins with it
    began: float = field(default_factory=time.monotonic)
    alias: str = ""  # "" until vLLM has found the model
    names_nothing: bool = False  # no model: the base answers
    version: Version | None = None
    caller: str = ""  # the name of the key, for the history of what it changes
    session: str = ""  # what its headers say of whom it is for
    user: str = ""  # what its body says, as vLLM has read it
    asked: frozenset[str] = frozenset()  # the fields of its body
    opening: str = ""  # how its conversation begins
    fault: ServeError | None = None  # why it gets no answer, where vLLM would say it worse
    warnings: list[str] = field(default_factory=list)  # what it asks for and does not get; ASCII

    def __post_init__(self) -> None:
        self.request_id = self.request_id or self.id

    @property
    def served(self) -> str:
        """The alias that answers, or the base; empty until a model was found."""
        return self.version.alias if self.version else self.alias

    @property
    def identity(self) -> str:
        """Whom the answer is for. Many may share a key: where nobody is named, those who go on
        with one conversation are one; a stranger without any is somebody else every time."""
        talk = f"{self.caller}\0{self.opening}" if self.opening else self.caller
        return self.session or self.user or talk or self.id


def tidy_id(given: str | None) -> str:
    """A client's request id as far as it may stand in a header and in a line of a log."""
    return _ID.sub("", given[: 8 * ID_LENGTH])[:ID_LENGTH] if given else ""


current: ContextVar[Turn | None] = ContextVar("turn", default=None)
