"""Ctrl-C and SIGTERM as a flag that the work looks at between its steps.

An exception raised by a signal handler comes up wherever the process is: in a compiled loop's
dispatcher or a callback from C it is lost, or turned into another one. Here the handler notes the
signal and `check` raises `Interrupted`, in whichever thread looks first and where the disk is in
order. Only commands `listen`: to a caller of the library, `check` does nothing.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STATUS = 2
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = b"\x1b[?25h\n"  # a progress bar hides it


class Interrupted(Exception):
    """The user stopped the command. Notes say how the next one goes on."""


class _State:
    """Of this process. Plain attributes: a handler that took a lock could wait for itself."""

    program = ""
    asked = False  # to stop
    looked = False  # since when a signal waits for the next look
    as_json = False  # whether a program reads stdout


def listen(program: str) -> None:
    """From here on signals are noted, for `check`. For a command's main thread.

    Until the first look, and a second time, a signal ends the process at once, with one line of
    `program`'s and status 2: nothing was begun, or what lies on disk is what a crash leaves.
    """
    _State.program, _State.asked, _State.looked, _State.as_json = program, False, False, False
    # A shell starts background jobs with SIGINT ignored; a long job has to be stoppable too.
    for number in _SIGNALS:
        signal.signal(number, _note)


@contextmanager
def listening(program: str) -> Iterator[None]:
    """Listens in there; behind it signals do what they did before."""
    before = [signal.getsignal(number) for number in _SIGNALS]
    listen(program)
    try:
        yield
    finally:
        for number, handler in zip(_SIGNALS, before, strict=True):
            signal.signal(number, handler)


def tell_programs(wanted: bool) -> None:  # noqa: FBT001
    """Whether a signal that ends the process at once is an object on stdout too."""
    _State.as_json = wanted


def ignore() -> None:
    """Signals change nothing any more: the exit status is decided, and Python's end takes a while,
    in which they would kill."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def check() -> None:
    """Raises Interrupted if a signal came. For every thread; costs nothing."""
    _State.looked = True
    if _State.asked:
        raise Interrupted


def asked() -> bool:
    """Whether a signal came, for waits that have something to end first."""
    _State.looked = True
    return _State.asked


@contextmanager
def at_once() -> Iterator[None]:
    """A signal ends the process at once in there: for others' code that takes long, never looks
    and leaves nothing on disk that matters."""
    check()
    _State.looked = False
    try:
        yield
    finally:
        check()


def _note(_number: int, _frame: FrameType | None) -> None:
    if _State.asked or not _State.looked:
        _leave()
    _State.asked = True


def _leave() -> None:
    """Not by an exception: this runs in a handler, wherever the process is."""
    left = (
        "the same command goes on from what is on disk" if _State.asked else "nothing was written"
    )
    line = f"interrupted; {left}"
    if _State.as_json:
        event = {"event": "error", "kind": "Interrupted", "message": line, "status": STATUS}
        os.write(1, f"{json.dumps(event)}\n".encode())
    cursor = _SHOW_CURSOR if os.isatty(2) else b""
    os.write(2, cursor + f"{_State.program}: {line}\n".encode())
    os._exit(STATUS)
