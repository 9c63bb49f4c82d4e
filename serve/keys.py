"""API keys and what each may do; a key is kept only as its SHA-256 digest.

The file has a line per key, NAME:SCOPES:KEY, scopes comma-separated out of `inference`, `metrics`
and `admin` (which includes the others). Blank lines and lines that start with # are skipped. A file
that changes is read again while the server runs; one that cannot be used changes nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import stat
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from serve import given_files
from serve.errors import InvalidKey, SettingsError

logger = logging.getLogger(__name__)

SCOPES = ("inference", "metrics", "admin")
SHORTEST_KEY = 16
LOOK_EVERY_S = 2.0
LARGEST_FILE = 16 << 20

# How a file is told from the one that was read: Kubernetes swaps a link for a change.
Stamp = tuple[int, int, int, int]


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

    def __init__(self, path: Path | None) -> None:
        """SettingsError names what is wrong with the file, and the line."""
        self._path = path
        self._callers = _read(path) if path else None
        self._stamp = _stamp(path)

    def caller(self, authorization: str | None, api_key: str | None = None) -> Caller:
        """The caller of an Authorization header. InvalidKey when there is none or it is unknown.

        `api_key` is that of an x-api-key header, "" where a route takes one and there is none; it
        counts where Authorization is missing. The lookup compares digests, so its timing tells
        nothing about a key.
        """
        if self._callers is None:
            return ANYONE
        scheme, _, token = (authorization or "").partition(" ")
        if authorization is None and api_key:
            scheme, token = "bearer", api_key
        if scheme.lower() != "bearer" or not token:
            also = "" if api_key is None else ", or x-api-key: KEY"
            raise InvalidKey(f"no API key given: send the header Authorization: Bearer KEY{also}")
        found = self._callers.get(_digest(token.strip()))
        if found is None:
            raise InvalidKey("the API key given is not known to this server")
        return found

    def reload(self) -> str:
        """Take the file as it is now; where it is bad, keep what was. A line about either."""
        if self._path is None:
            return "there is no key file to read again"
        self._stamp = _stamp(self._path)
        if self._path.exists() and not self._path.is_file():  # a pipe would be waited for
            return f"the keys stay as they were: {self._path} is not a plain file"
        try:
            self._callers = _read(self._path)
        except SettingsError as fault:
            return f"the keys stay as they were: {fault}"
        return f"{self._path} was read again: {len(self._callers)} keys"

    def changed(self) -> bool:
        """Whether the file is another one than was read last."""
        return _stamp(self._path) != self._stamp

    async def follow(self, every_s: float = LOOK_EVERY_S) -> None:
        """Read the file again whenever it has changed; until cancelled."""
        while self._path is not None:
            await asyncio.sleep(every_s)
            if self.changed():
                logger.error(self.reload())  # what is less is not shown to operators


def load(path: Path | None) -> Keys:
    """The keys of a file; SettingsError names the line that is wrong."""
    return Keys(path)


def _stamp(path: Path | None) -> Stamp | None:
    try:
        found = path.stat() if path else None
    except OSError:
        return None
    return found and (found.st_ino, found.st_mtime_ns, found.st_size, found.st_ctime_ns)


def _read(path: Path) -> dict[bytes, Caller]:
    callers: dict[bytes, Caller] = {}
    places: dict[bytes, int] = {}
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        digest, caller = _parsed(line.strip(), f"{path}:{number}")
        if digest in callers:
            raise SettingsError(
                f"{path}:{number}: the key of {caller.name!r} is that of line {places[digest]} "
                "too; give each caller a key of its own"
            )
        callers[digest], places[digest] = caller, number
    if not callers:
        raise SettingsError(f"{path} holds no key; expected lines of NAME:SCOPES:KEY")
    _check_names(callers, places, path)
    return callers


def _text(path: Path) -> str:
    """What is in the file, which nobody but its owner may write."""
    try:
        raw = given_files.content(path, LARGEST_FILE, partial(_check_mode, path))
    except OSError as fault:
        raise SettingsError(f"cannot read the key file {path}: {fault.strerror}") from fault
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        raise SettingsError(
            f"{path}: byte {fault.start} is not UTF-8; save the key file as UTF-8"
        ) from fault
    if "\0" in text:
        raise SettingsError(f"{path} holds NUL bytes; save the key file as UTF-8 text")
    return text


def _check_mode(path: Path, found: os.stat_result) -> None:
    """Whoever its owner is: in a container that is the host's user, whom nobody here knows."""
    writable = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if stat.S_ISREG(found.st_mode) and writable:  # others cannot write into a pipe of the shell's
        raise SettingsError(
            f"others than its owner can write the key file {path} "
            f"(mode {stat.S_IMODE(found.st_mode):o}); run chmod go-w"
        )


def _parsed(line: str, place: str) -> tuple[bytes, Caller]:
    name, _, rest = line.partition(":")
    scopes, _, key = rest.partition(":")
    named = frozenset(scopes.split(","))
    if not name or not name.isprintable() or not key or not named <= set(SCOPES):
        raise SettingsError(
            f"{place}: expected NAME:SCOPES:KEY, SCOPES of {', '.join(SCOPES)} with commas"
        )
    if len(key) < SHORTEST_KEY:
        raise SettingsError(f"{place}: a key has at least {SHORTEST_KEY} characters")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise SettingsError(
            f"{place}: a key is printable ASCII without blanks, or no header has it"
        )
    return _digest(key), Caller(name, named)


def _check_names(callers: dict[bytes, Caller], places: dict[bytes, int], path: Path) -> None:
    """A caller may have several keys, to change them without a gap; they may all do the same."""
    known: dict[str, Caller] = {}
    for digest, caller in callers.items():
        if known.setdefault(caller.name, caller).scopes != caller.scopes:
            raise SettingsError(
                f"{path}:{places[digest]}: {caller.name!r} has other scopes here than above; give "
                "every key of a name the same"
            )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
