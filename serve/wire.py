"""Errors as clients read them: one `Told` per error, written in the dialect of the route's API.

Whoever made an error (we, vLLM, FastAPI, pydantic), it leaves with a plain sentence, a type, a
string code and the field as the API's own server names them: as a whole answer, or as the last
event of a stream. A message is never empty, never a Python repr and never longer than
MESSAGE_LIMIT characters, whatever it quotes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any

from serve.errors import ServeError

MESSAGE_LIMIT = 1000
CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "not_enabled",  # vLLM's own: a route that a flag opens; scopes are ours
    404: "not_found",
    405: "method_not_allowed",
    409: "conflict",
    413: "request_too_large",
    422: "invalid_request",
    429: "rate_limit_exceeded",
    503: "server_overloaded",
}
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}
UNREADABLE = "a field of the request is of another type than the API has for it"
FAILED = "the server failed to answer this request; its log says more under the request's id"
# What vLLM and its libraries say to nobody in particular, and what is meant.
OBSCURE = {
    "TextEncodeInput must be": "a text holds characters that are not Unicode, such as one half of "
    "a surrogate pair; send whole characters",
    "codec can't decode": "the body is not UTF-8",
    "surrogates not allowed": "a text holds one half of a surrogate pair; send whole characters",
}

_REPR = re.compile(
    r"<class '|<[\w.]+ object|object has no attribute|NoneType|Traceback \(most|"
    r"validation errors? for \w|\binput_type=|^['\"][^'\"]*['\"]$|(Error|Exception)\(['\")]|"
    r"^\w+(Error|Exception)\b|unexpected keyword argument|not subscriptable|is not iterable|"
    r"<locals>|got multiple values for"
)
_KEY = re.compile(r"^(?:KeyError\()?['\"]([\w.-]{1,64})['\"]\)?$")
_VLLMS_TAIL = re.compile(r" \(parameter=[\w.]+(?:, value=.*)?\)$|: \{'.*\}\.?$", re.DOTALL)
_PYDANTIC = re.compile(r"^\d+ validation errors? for \S+\n", re.MULTILINE)
_PYDANTIC_FAULT = re.compile(r"^(\S.*)\n  (\S.*?)(?: \[type=.*\])?$", re.MULTILINE)
_WORD = re.compile(r"\b[a-z]\w*")
_OF_THE_PROMPT = re.compile(r"prompt|[Tt]oken id|conversation|multimodal|^\d+[.:]|content")
PROMPTS = ("messages", "prompt", "input")
_ERROR_EVENT = re.compile(rb'event: error\b|data: ?\{\s*"error"\s*:')
_LATER_ERROR_EVENT = re.compile(rb'\n(?:event: error\b|data: ?\{\s*"error"\s*:)')
_DATA = re.compile(rb"(?:\A|\n)data: ?(\{.*)")


@dataclass(frozen=True, slots=True)
class Told:
    """One error, as it is told to a client; its fields are those of ServeError."""

    status: int
    message: str
    type: str
    code: str
    param: str | None = None
    retry_after_s: int | None = None
    refuses: bool = True

    def fields(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}


@dataclass(frozen=True, slots=True)
class Dialect:
    """How an API writes an error, and by which lines one knows that its streams are whole.

    `event` is given the number of events that were sent before.
    """

    body: Callable[[Told, str], dict[str, Any]]
    event: Callable[[Told, str, int], bytes]
    ends: tuple[bytes, ...] = ()


def told_of(fault: ServeError) -> Told:
    """An error of ours."""
    message, wait_s = cut(str(fault) or FAILED), fault.retry_after_s
    return Told(fault.status, message, fault.type, fault.code, fault.param, wait_s, fault.refuses)


def read_error(status: int, raw: bytes, path: str) -> Told:
    """An error answer that vLLM or FastAPI made; a validation error's status becomes 400.

    What already has a string code was said by us, and is left as it is.
    """
    parsed = _parsed(raw)
    given = parsed.get("error")
    if not isinstance(given, dict):
        message = given if isinstance(given, str) else _message(status, parsed, raw, path)
        given = {"message": message, "param": _param(parsed)}
    if status == HTTPStatus.UNPROCESSABLE_ENTITY and not isinstance(given.get("code"), str):
        status = HTTPStatus.BAD_REQUEST.value
    return _told(status, given)


def with_field(told: Told, asked: Collection[str]) -> Told:
    """A 400 with the field that its words name, of those that the client sent, if it has none."""
    if told.status != HTTPStatus.BAD_REQUEST or told.param is not None:
        return told
    words = (word for word in _WORD.findall(told.message) if word in asked and word != "model")
    field = next(words, None)
    if field is None and _OF_THE_PROMPT.search(told.message):
        field = next((name for name in PROMPTS if name in asked), None)
    return replace(told, param=field)


def error_event(chunk: bytes) -> Told | None:
    """The error that a piece of a stream carries, if it does. Cheap where it does not."""
    if b"error" not in chunk:
        return None
    event = _ERROR_EVENT.match(chunk)
    if event is None and has_several(chunk):
        event = _LATER_ERROR_EVENT.search(chunk)
    if event is None:
        return None
    data = _DATA.search(chunk, event.start())
    parsed = _parsed(data[1]) if data else {}
    given = parsed.get("error") or parsed
    if not isinstance(given, dict):
        given = {"message": str(given)}
    code = given.get("code")
    status = code if isinstance(code, int) and code in range(400, 600) else 500
    return _told(status, given)


def has_several(chunk: bytes) -> bool:
    """Whether a piece of a stream is more than one event; vLLM sends them one by one."""
    return chunk.count(b"\n\n") > 1


def cut(text: str, at: int = MESSAGE_LIMIT) -> str:
    """Head and tail of a text that is too long to be told."""
    if len(text) <= at:
        return text
    head, tail = text[: at * 2 // 3], text[-at // 5 :]
    return f"{head} [{len(text) - len(head) - len(tail)} characters left out] {tail}"


def _told(status: int, given: dict[str, Any]) -> Told:
    if isinstance(given.get("code"), str) and isinstance(given.get("message"), str):
        kind = given.get("type")
        fallback = _type(status)
        ours = Told(status, cut(given["message"]) or FAILED, fallback, given["code"], _text(given))
        return replace(ours, type=kind) if isinstance(kind, str) else ours
    message = plain(status, given.get("message"))
    return Told(status, message, _type(status), _code(status, message, given), _text(given))


def _text(given: dict[str, Any]) -> str | None:
    param = given.get("param")
    return cut(param).removeprefix("body.") or None if isinstance(param, str) else None


def plain(status: int, message: object) -> str:
    """A sentence for a person, of what a library said."""
    text = cut(message.strip(), at=4 * MESSAGE_LIMIT) if isinstance(message, str) else ""
    for obscure, meant in OBSCURE.items():
        if obscure in text:
            return meant
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return FAILED if _says_nothing(text) or _REPR.search(text) else cut(text)
    text = _without_pydantic(without_tail(text))
    if not text:
        return f"{HTTPStatus(status).phrase.lower()}: the request cannot be served as it is"
    if lacking := _KEY.search(text):
        return f"the request lacks {lacking[1]}, or has it where it is not expected"
    return UNREADABLE if _REPR.search(text) else cut(text)


def _says_nothing(text: str) -> bool:
    return text.lower().rstrip(".") in ("", "internal server error")


def without_tail(text: str) -> str:
    """Without what vLLM's exceptions say for programs."""
    return _VLLMS_TAIL.sub("", text)


def _without_pydantic(text: str) -> str:
    """pydantic's own list of faults, one line per field, as a sentence."""
    found = _PYDANTIC.search(text)
    if not found:
        return text
    faults = _PYDANTIC_FAULT.findall(text, found.end())[:3]
    told = (f"{_fields_of(path)}: {fault}" for path, fault in faults)
    return "; ".join(dict.fromkeys(told))


def _fields_of(path: str) -> str:
    """pydantic's path without the Python types that it tried."""
    fields = [part for part in path.split(".") if not part[:1].isupper() and "[" not in part]
    return ".".join(fields) or "the value"


def _type(status: int) -> str:
    return TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")


def _code(status: int, message: str, given: dict[str, Any]) -> str:
    if status == HTTPStatus.NOT_FOUND and _about_the_model(message, given):
        return "model_not_found"
    if status == HTTPStatus.BAD_REQUEST and "maximum context length" in message:
        return "context_length_exceeded"
    return CODES.get(status, "invalid_request" if status < 500 else "internal_error")


def _about_the_model(message: str, given: dict[str, Any]) -> bool:
    return given.get("param") == "model" or message.startswith("The model `")


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _message(status: int, parsed: dict[str, Any], raw: bytes, path: str) -> str:
    detail = parsed.get("detail")
    if status == HTTPStatus.NOT_FOUND and detail in (None, "Not Found"):
        return f"there is no {path} here"
    if isinstance(detail, list):  # FastAPI's validation errors
        return "; ".join(f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}" for e in detail)
    text = detail if isinstance(detail, str) else parsed.get("message")
    if isinstance(text, str) and text:
        return text
    return "" if parsed else raw.decode(errors="replace").strip() or HTTPStatus(status).phrase


def _param(parsed: dict[str, Any]) -> str | None:
    detail = parsed.get("detail")
    if isinstance(detail, list) and detail:
        return ".".join(map(str, detail[0]["loc"][1:])) or None
    return None


def dialect_of(path: str) -> Dialect:
    """Of the API that a path belongs to; OpenAI's where it belongs to none."""
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return ANTHROPIC
    if path == "/v1/responses":
        return RESPONSES
    return OPENAI if path not in ("/v1/chat/completions", "/v1/completions") else COMPLETIONS


def _openai_body(told: Told, _: str) -> dict[str, Any]:
    return {"error": told.fields()}


def _openai_event(told: Told, _: str, __: int) -> bytes:
    return _event(None, {"error": told.fields()})


def _responses_event(told: Told, _: str, sent: int) -> bytes:
    """Both as OpenAI documents it, flat, and as its clients look for it, under `error`."""
    data = {"type": "error", "sequence_number": sent, "error": told.fields()}
    flat = {name: value for name, value in told.fields().items() if name != "type"}
    return _event("error", data | flat)


def _anthropic_body(told: Told, request_id: str) -> dict[str, Any]:
    fallback = "invalid_request_error" if told.status < 500 else "api_error"
    kind = ANTHROPIC_TYPES.get(told.status, fallback)
    fault = {"type": kind, "message": told.message}
    return {"type": "error", "error": fault, "request_id": request_id}


def _anthropic_event(told: Told, request_id: str, _: int) -> bytes:
    return _event("error", _anthropic_body(told, request_id))


def _event(name: str | None, data: dict[str, Any]) -> bytes:
    line = f"data: {json.dumps(data)}\n\n"
    return (f"event: {name}\n{line}" if name else line).encode()


OPENAI = Dialect(_openai_body, _openai_event)  # other routes: how their streams end is not known
COMPLETIONS = replace(OPENAI, ends=(b"data: [DONE]",))
RESPONSES = Dialect(
    _openai_body,
    _responses_event,
    (b"event: response.completed", b"event: response.incomplete", b"event: response.failed"),
)
ANTHROPIC = Dialect(_anthropic_body, _anthropic_event, (b"event: message_stop",))
