"""Which of two versions a user gets: the same one every time, and only ever more users the new."""

from __future__ import annotations

import hashlib


def share_of(alias: str, user: str) -> float:
    """A fixed number in [0, 1) for a user of an alias.

    Users below the canary's weight get the canary: raising the weight adds users and moves nobody
    back. Aliases differ, or the same users would try out everything.
    """
    digest = hashlib.sha256(f"{alias}\0{user}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
