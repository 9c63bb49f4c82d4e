"""Which of two versions a user gets: the same one every time, and only ever more users the new."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any


def share_of(alias: str, user: str) -> float:
    """A fixed number in [0, 1) for a user of an alias.

    Users below the canary's weight get the canary: raising the weight adds users and moves nobody
    back. Aliases differ, or the same users would try out everything.
    """
    digest = hashlib.sha256(f"{alias}\0{user}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def opening_of(asked: Mapping[str, Any]) -> str:
    """How a conversation begins: a digest of its first user message, or of the whole prompt.

    `asked` are the fields of a request as vLLM has parsed them. Stays the same while messages are
    added, and tells the users of one key apart. Empty where there is nothing to go by.
    """
    said = asked.get("prompt") or asked.get("input")
    messages = asked.get("messages") or said
    if isinstance(messages, list):
        turns = (m for m in messages if isinstance(m, dict) and m.get("role") == "user")
        said = next((turn.get("content") for turn in turns), said)
    if not isinstance(said, str | list):
        return ""
    return hashlib.sha256(repr(said).encode("utf-8", "replace")).hexdigest()
