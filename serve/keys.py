"""Bearer keys and what each may do; a key is kept only as its SHA-256 digest.

The file has a line per key, NAME:SCOPES:KEY, scopes comma-separated out of `inference`, `metrics`
and `admin` (which includes the others). Blank lines and lines that start with # are skipped.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from serve.errors import InvalidKey, SettingsError

SCOPES = ("inference", "metrics", "admin")
SHORTEST_KEY = 16


@dataclass(frozen=True, slots=True)
class Caller:
    """Who a key belongs to."""

    name: str
    scopes: frozenset[str]

    def may(self, scope: str) -> bool:
        return scope in self.scopes or "admin" in self.scopes


ANYONE = Caller("anyone", frozenset(SCOPES))


class Keys:
    """The callers by key digest. Without a file everybody may everything (loopback only)."""

    def __init__(self, callers: dict[bytes, Caller] | None) -> None:
        self._callers = callers

    def caller(self, authorization: str | None) -> Caller:
        """The caller of an Authorization header. InvalidKey when there is none or it is unknown.

        The lookup compares digests, so its timing tells nothing about a key.
        """
        if self._callers is None:
            return ANYONE
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise InvalidKey("no API key given: send the header Authorization: Bearer KEY")
        found = self._callers.get(_digest(token.strip()))
        if found is None:
            raise InvalidKey("the API key given is not known to this server")
        return found


def load(path: Path | None) -> Keys:
    """The keys of a file; SettingsError names the line that is wrong."""
    if path is None:
        return Keys(None)
    try:
        lines = path.read_text().splitlines()
    except OSError as fault:
        raise SettingsError(f"cannot read the key file {path}: {fault.strerror}") from fault
    callers = {}
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            digest, caller = _parsed(line.strip(), f"{path}:{number}")
            callers[digest] = caller
    if not callers:
        raise SettingsError(f"{path} holds no key; expected lines of NAME:SCOPES:KEY")
    return Keys(callers)


def _parsed(line: str, place: str) -> tuple[bytes, Caller]:
    name, _, rest = line.partition(":")
    scopes, _, key = rest.partition(":")
    named = frozenset(scopes.split(","))
    if not name or not key or not named <= set(SCOPES):
        raise SettingsError(
            f"{place}: expected NAME:SCOPES:KEY, SCOPES of {', '.join(SCOPES)} with commas"
        )
    if len(key) < SHORTEST_KEY:
        raise SettingsError(f"{place}: a key has at least {SHORTEST_KEY} characters")
    return _digest(key), Caller(name, named)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
