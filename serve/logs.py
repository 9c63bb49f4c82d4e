"""What every line of the worker's log carries: the id of its request, and no more than a screen.

vLLM logs what clients send it, whole, and a client's mistake on some routes with a traceback. The
parent reads these lines, and so does an operator.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from serve.turn import current

LINE_LIMIT = 4_000  # characters of a message
TRACE_LIMIT = 20_000  # of a traceback; its end says what happened


class RequestLines(logging.Filter):
    """Rewrites each record once; `is_clients` says of an exception that the client caused it."""

    def __init__(self, is_clients: Callable[[BaseException], bool]) -> None:
        super().__init__()
        self._is_clients = is_clients

    def filter(self, record: logging.LogRecord) -> bool:
        if "request_line" in vars(record):
            return True
        record.request_line = True
        text, turn = record.getMessage(), current.get()
        if len(text) > LINE_LIMIT:
            text = f"{text[:LINE_LIMIT]} [{len(text) - LINE_LIMIT} characters left out]"
        if turn is not None and turn.id not in text:
            text = f"{text} (request {turn.id})"
        record.msg, record.args = text, None
        fault = record.exc_info[1] if record.exc_info else None
        told = record.name.startswith("vllm.entrypoints")  # and answered with a status
        if fault is not None and told and self._is_clients(fault):
            record.exc_info = record.exc_text = None
        elif record.exc_info:
            trace = logging.Formatter().formatException(record.exc_info)
            record.exc_text = trace[-TRACE_LIMIT:]
        return True


def attach(is_clients: Callable[[BaseException], bool]) -> None:
    """To every handler there is; once the server has set its own up."""
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
    handlers = [handler for logger in (logging.root, *loggers) for handler in logger.handlers]
    lines = RequestLines(is_clients)
    for handler in {*handlers, logging.lastResort}:
        if handler and not any(isinstance(known, RequestLines) for known in handler.filters):
            handler.addFilter(lines)
