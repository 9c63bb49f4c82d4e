"""What a client is told that asks for a model that is not here: which are, nearest first."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher
from heapq import nlargest

from serve.errors import ModelNotFound
from serve.settings import LONGEST_ALIAS

SHOWN = 10
COMPARED = 1000  # names; a comparison takes some 20 microseconds


def unknown_model(asked: object, names: Iterable[str]) -> ModelNotFound:
    """`names` are those that the client may use, the base's first."""
    known = list(names)
    text = str(asked)
    short = text[:LONGEST_ALIAS]
    matcher = SequenceMatcher(a="", b=short.lower(), autojunk=False)

    def likeness(name: str) -> float:
        matcher.set_seq1(name.lower())
        return matcher.ratio()

    near = nlargest(SHOWN, known[:COMPARED], key=likeness)
    more = f" and {len(known) - len(near)} more, listed at /v1/models" * (len(known) > len(near))
    cut = "..." * (len(text) > len(short))
    return ModelNotFound(
        f"the model {short!r}{cut} does not exist; expected one of {', '.join(near)}{more}",
        param="model",
    )
