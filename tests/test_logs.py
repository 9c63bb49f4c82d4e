"""A line of the log names its request and is cut; only faults of ours have a traceback."""

from __future__ import annotations

import logging
from contextvars import Context

import pytest

from serve.logs import LINE_LIMIT, TRACE_LIMIT, RequestLines
from serve.turn import Turn, current


class Clients(Exception):
    pass


def is_clients(fault: BaseException) -> bool:
    return isinstance(fault, Clients)


API = "vllm.entrypoints.anthropic.api_router"


def written(
    message: str,
    *args: object,
    fault: BaseException | None = None,
    name: str = API,
    turn: Turn | None = None,
) -> str:
    """The line, as it is written within `turn`."""
    exc_info = (type(fault), fault, None) if fault else None
    record = logging.LogRecord(name, logging.ERROR, "f.py", 1, message, args, exc_info)
    context = Context()
    context.run(current.set, turn)
    assert context.run(RequestLines(is_clients).filter, record)
    assert context.run(RequestLines(is_clients).filter, record)  # a second handler adds nothing
    return logging.Formatter().format(record)


def test_a_line_names_the_request_it_belongs_to_once() -> None:
    mine = Turn(id="mine")
    assert written("loaded %d", 3) == "loaded 3"
    assert written("no such %s", "model", turn=mine) == "no such model (request mine)"
    named = "Aborted request(s) chatcmpl-mine-1."
    assert written(named, turn=mine) == named


@pytest.mark.parametrize("size", [LINE_LIMIT + 1, 2_000_000])
def test_what_a_client_sent_is_not_echoed_whole(size: int) -> None:
    assert len(written("Error with model %s", "m" * size)) < LINE_LIMIT + 100
    line = written("failed", fault=RuntimeError("m" * size * 10))
    assert len(line) < TRACE_LIMIT + 100


def test_a_traceback_is_for_faults_of_ours() -> None:
    line = written("Error in create_messages: %s", "no messages", fault=Clients("no messages"))
    assert line == "Error in create_messages: no messages"
    elsewhere = written("failed", fault=Clients("a bug"), name="serve.adapters.reconciler")
    assert "Clients: a bug" in elsewhere
    assert "RuntimeError: broken" in written("failed", fault=RuntimeError("broken"))
