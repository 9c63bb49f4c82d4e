"""A GGUF file's metadata as typed values, and which of its keys nobody has asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from quant.intake.gguf_header import Header

_MOST, _LARGEST = 1 << 31, 1e30


class Keys:
    """Reads `header` by key. A key that begins with a dot is the architecture's own.

    Every reader refuses, by SourceError, a value of another type; without a `default` the file has
    to have the key.
    """

    def __init__(self, header: Header) -> None:
        self.header, self._asked = header, {""}
        self.architecture = self.text("general.architecture")

    def text(self, key: str, default: str | None = None) -> str:
        return str(self._of(key, "a text", (str,), default))

    def whole(self, key: str, default: int | None = None, least: int = 0) -> int:
        found = int(self._of(key, "a whole number", (int,), default))
        if not least <= found < _MOST:
            raise self.header.refused(f"{self.full(key)} is {found}")
        return found

    def number(self, key: str, default: float | None = None) -> float:
        """The shortest decimal that is the file's float32: 1e-06, not 9.99999997e-07."""
        found = self._of(key, "a number", (int, float), default)
        if not math.isfinite(found) or abs(found) > _LARGEST:
            raise self.header.refused(f"{self.full(key)} is {found}")
        return float(str(np.float32(found)))

    def flag(self, key: str, default: bool) -> bool:  # noqa: FBT001
        return bool(self._of(key, "true or false", (bool,), default))

    def texts(self, key: str) -> list[str]:
        return self._list(key, "texts", (str,))

    def numbers(self, key: str) -> list[float]:
        return self._list(key, "numbers", (int, float))

    def flags(self, key: str) -> list[bool]:
        return self._list(key, "true and false", (bool,))

    def __contains__(self, key: str) -> bool:
        return self.full(key) in self.header.metadata

    def full(self, key: str) -> str:
        return f"{self.architecture}{key}" if key.startswith(".") else key

    def pass_over(self, *keys: str) -> None:
        """Keys on which nothing depends."""
        self._asked |= {self.full(key) for key in keys}

    def check_used(self, harmless: Iterable[str]) -> None:
        """SourceError names the keys that nobody has asked for and that do not begin as `harmless`
        ones do."""
        left = sorted(
            key
            for key in self.header.metadata.keys() - self._asked
            if not key.startswith(tuple(harmless))
        )
        if left:
            told = ", ".join(f"{key} = {self.header.metadata[key]!s:.40}" for key in left[:4])
            more = f" and {len(left) - 4} more" if len(left) > 4 else ""
            raise self.header.refused(
                f"it says {told}{more}, which would be lost; give the model's Hugging Face folder"
            )

    def _list(self, key: str, what: str, kinds: tuple[type, ...]) -> list[Any]:
        found = self._of(key, f"an array of {what}", (list,), None)
        if not all(type(entry) in kinds for entry in found):
            raise self.header.refused(f"{self.full(key)} is not an array of {what}")
        return list(found)

    def _of(self, key: str, what: str, kinds: tuple[type, ...], default: Any) -> Any:
        key = self.full(key)
        self._asked.add(key)
        found = self.header.metadata.get(key, default)
        if found is None:
            raise self.header.refused(f"it has no {key}")
        if type(found) not in kinds:  # a bool is no number
            raise self.header.refused(f"{key} is {found!s:.40}, and should be {what}")
        return found
