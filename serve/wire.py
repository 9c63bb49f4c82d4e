"""Error bodies in OpenAI's shape, whoever made the error.

vLLM answers with integer codes and its own type names, FastAPI with {"detail": ...}; the official
clients read `error.message`, `error.type`, `error.param` and a string `error.code`.
"""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "insufficient_scope",
    404: "not_found",
    405: "method_not_allowed",
    409: "conflict",
    413: "request_too_large",
    422: "invalid_request",
    429: "rate_limit_exceeded",
    503: "server_overloaded",
}
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def openai_error(status: int, raw: bytes, path: str) -> tuple[int, dict[str, Any]]:
    """The status and body to send for an error answer that vLLM or FastAPI made.

    A validation error becomes 400. What already has our shape is left as it is.
    """
    told = _parsed(raw)
    fault = told.get("error")
    if isinstance(fault, dict) and isinstance(fault.get("code"), str):
        return status, told
    if not isinstance(fault, dict):
        fault = {"message": _message(status, told, raw, path), "param": _param(told)}
    status = 400 if status == HTTPStatus.UNPROCESSABLE_ENTITY else status
    body = {
        "message": str(fault.get("message", "")),
        "type": TYPES.get(status, "invalid_request_error" if status < 500 else "server_error"),
        "param": fault.get("param"),
        "code": _code(status, fault),
    }
    return status, {"error": body}


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        told = json.loads(raw)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _code(status: int, fault: dict[str, Any]) -> str:
    if status == HTTPStatus.NOT_FOUND and fault.get("param") == "model":
        return "model_not_found"
    if status == HTTPStatus.BAD_REQUEST and "maximum context length" in str(fault.get("message")):
        return "context_length_exceeded"
    return CODES.get(status, "invalid_request" if status < 500 else "internal_error")


def _message(status: int, told: dict[str, Any], raw: bytes, path: str) -> str:
    detail = told.get("detail")
    if status == HTTPStatus.NOT_FOUND and detail in (None, "Not Found"):
        return f"there is no {path} here"
    if isinstance(detail, list):  # FastAPI's validation errors
        return "; ".join(f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}" for e in detail)
    return str(detail or raw.decode(errors="replace").strip() or HTTPStatus(status).phrase)


def _param(told: dict[str, Any]) -> str | None:
    detail = told.get("detail")
    if isinstance(detail, list) and detail:
        return ".".join(map(str, detail[0]["loc"][1:])) or None
    return None
