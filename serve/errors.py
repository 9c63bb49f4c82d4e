"""What can go wrong while serving, as nouns with a status; the one table is the class attributes.

Every error a client sees is OpenAI's shape: {"error": {"message", "type", "param", "code"}}; on
Anthropic's routes it is theirs (serve/wire.py).
"""

from __future__ import annotations

from typing import Any, ClassVar


class ServeError(Exception):
    """Base of this package's errors. `param` names the offending field, where there is one."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"
    retry_after_s: ClassVar[int | None] = None
    refuses: ClassVar[bool] = True  # a 429 or 503 turns a request away; False: it was lost

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    def body(self) -> dict[str, Any]:
        """The OpenAI error object."""
        fault = {"message": str(self), "type": self.type, "param": self.param, "code": self.code}
        return {"error": fault}


class SettingsError(ServeError):
    """The operator's flags, environment or key file; the command exits with 2."""


class InvalidKey(ServeError):
    status, type, code = 401, "authentication_error", "invalid_api_key"


class Forbidden(ServeError):
    status, type, code = 403, "permission_error", "insufficient_scope"


class NotFound(ServeError):
    status, type, code = 404, "invalid_request_error", "not_found"


class ModelNotFound(ServeError):
    status, type, code = 404, "invalid_request_error", "model_not_found"


class BadRequest(ServeError):
    status, type, code = 400, "invalid_request_error", "invalid_request"


class AdapterRefused(ServeError):
    """The folder cannot be served on this base; `param` is the field that differs."""

    status, type, code = 422, "invalid_request_error", "adapter_refused"


class AdapterMissing(AdapterRefused):
    """There is no adapter at the source: no folder, or not its files."""


class SourceUnavailable(ServeError):
    """An adapter's source could not be reached; what it holds is unknown."""

    status, type, code = 502, "server_error", "source_unavailable"
    retry_after_s = 10


class SourcesBusy(ServeError):
    """As many adapters are being fetched as may be; nothing was tried."""

    status, type, code = 503, "server_error", "sources_busy"
    retry_after_s = 10


class StoreFailed(ServeError):
    """The disk does not take an adapter."""

    status, type, code = 507, "server_error", "store_failed"


class NotReady(ServeError):
    status, type, code = 503, "server_error", "server_not_ready"
    retry_after_s = 2


class Draining(ServeError):
    status, type, code = 503, "server_error", "server_draining"
    retry_after_s = 5


class EngineStalled(ServeError):
    """The engine stands still: it goes on, or another is started."""

    status, type, code = 503, "server_error", "engine_stalled"
    retry_after_s = 5


class AdapterSlotsFull(ServeError):
    status, type, code = 503, "server_error", "adapter_slots_full"
    retry_after_s = 5


class EngineDied(ServeError):
    """The engine ended under its requests, which may be sent again: another is being started."""

    status, type, code = 503, "server_error", "engine_died"
    retry_after_s = 5
    refuses = False


class LineTooLong(ServeError):
    status, type, code = 414, "invalid_request_error", "uri_too_long"


class HeadersTooLarge(ServeError):
    status, type, code = 431, "invalid_request_error", "headers_too_large"


class BodyTooLarge(ServeError):
    status, type, code = 413, "invalid_request_error", "request_too_large"


class EncodedBody(ServeError):
    status, type, code = 415, "invalid_request_error", "unsupported_encoding"


class TooSlow(ServeError):
    status, type, code = 408, "invalid_request_error", "request_timeout"


class TooManyConnections(ServeError):
    status, type, code = 503, "server_error", "server_overloaded"
    retry_after_s = 2


class Conflict(ServeError):
    """The alias is not what the caller took it for."""

    status, type, code = 409, "invalid_request_error", "conflict"


class PreconditionFailed(ServeError):
    """If-Match names another revision than the alias has."""

    status, type, code = 412, "invalid_request_error", "precondition_failed"


class RegistryDown(ServeError):
    """What is loaded goes on serving; nothing can be changed."""

    status, type, code = 503, "server_error", "registry_unavailable"
    retry_after_s = 5
