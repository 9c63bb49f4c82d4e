"""What can go wrong on the way to an artifact; the command line prints it and exits."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from quant.interrupt import Interrupted


class QuantError(Exception):
    """The user can act on it: the message says what, where, and what was expected."""

    exit_status: ClassVar[int] = 2


class UsageError(QuantError):
    """A command line that is typed wrong."""


class RecipeError(QuantError):
    """The recipe asks for something impossible or unknown."""


class SourceError(QuantError):
    """The model given is missing, damaged, or of a kind that cannot be quantized."""


class AdapterError(QuantError):
    """A LoRA folder that cannot be used, or does not fit the base.

    `field` names what differs (a config key or a module), with what was expected and found, so
    that an HTTP error body can carry the three apart from the sentence.
    """

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        expected: str | None = None,
        found: str | None = None,
    ) -> None:
        super().__init__(message)
        self.field = field
        self.expected = expected
        self.found = found


class CalibrationError(QuantError):
    """A file of texts, chats or questions holds a malformed line, or nothing usable."""


class TemplateRefusal(CalibrationError):
    """A chat template does not take messages; the message is what it says."""


class SolveError(QuantError):
    """A layer could not be solved; the message names it."""


class ArtifactError(QuantError):
    """A folder of weights is damaged, or disagrees with its manifest."""


class SpaceError(QuantError):
    """Not enough disk for the result."""


class RoomError(QuantError):
    """Not enough memory for the work."""


class TargetExists(QuantError):
    """The output folder is there already and was not asked to be replaced."""


class CompareError(QuantError):
    """Parent and artifact do not belong together, or one of them cannot be run."""


class TooLossy(QuantError):
    """The artifact is further from its parent than was allowed."""

    exit_status = 3


@contextmanager
def during(what: str) -> Iterator[None]:
    """Notes on an exception that nobody foresaw what was being done, such as "solving ...".

    A QuantError says it already, and who interrupts knows.
    """
    try:
        yield
    except (QuantError, Interrupted):
        raise
    except Exception as fault:
        fault.add_note(f"while {what}")
        raise


class _Brief(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxother = 2, 80

    def repr_int(self, value: int, _level: int) -> str:
        """Python spends the square of a number's digits on writing them."""
        return repr(value) if abs(value) < 1 << 64 else f"an integer of {value.bit_length()} bits"


def brief(value: object) -> str:
    """The repr of what somebody else wrote, for a message: cut while it is made, not behind that,
    since a few bytes of a pickle hold a value whose text would fill all memory."""
    return _Brief().repr(value)
