"""A running server as a client sees it: its address, a key, JSON answers and streams of events.

Every fault is a ServerError of one line. Redirects are not followed, so that a key goes nowhere
else. Answers are bounded in bytes and in time.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import re
import signal
import ssl
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

import httpx2

from quant.interrupt import Interrupted
from serve import given_files, settings
from serve.errors import ServeError, SettingsError
from serve.keys import SCOPES

T = TypeVar("T")

DEFAULT = "http://127.0.0.1:8000"
CONNECT_S = 10.0
ANSWER_S = 30.0  # for a question that takes the server no work
SILENCE_S = 600.0  # between two pieces of a stream: a long prompt, a queue
ANSWER_BYTES = 32 << 20
KEY_BYTES = 64 << 10
SHOWN = 1000  # characters of what a server says
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class ServerError(ServeError):
    """What the server answered, or that none did. `answered` is the HTTP status, 0 without one, and
    `reason` the server's code of the error."""

    def __init__(
        self, message: str, answered: int = 0, reason: str = "", param: str | None = None
    ) -> None:
        super().__init__(message, param=param)
        self.answered, self.reason = answered, reason


@dataclass(frozen=True, slots=True)
class Address:
    """Where the server is, and what it is shown and trusted by."""

    url: str
    key: str = field(default="", repr=False)
    cacert: Path | None = None

    @property
    def is_here(self) -> bool:
        """Whether it is a loopback address: it is this machine, or a container of it."""
        host = httpx2.URL(self.url).host
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"


def address(
    server: str | None = None, key_file: Path | None = None, cacert: Path | None = None
) -> Address:
    """By the options, else by the environment, else DEFAULT. SettingsError says what is wrong."""
    default, key = settings.client()
    if key_file is not None:
        key = _only_line(key_file)
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        origin = settings.API_KEY if key_file is None else str(key_file)
        raise SettingsError(f"{origin}: a key is one word of printable ASCII")
    origin = "--server" if server else settings.SERVER
    return Address(_url(server or default or DEFAULT, origin), key, cacert)


def _url(text: str, origin: str) -> str:
    """With a scheme, and without the /v1 that OpenAI's clients add."""
    whole = text if "://" in text else f"http://{text}"
    try:
        url = httpx2.URL(whole)
    except httpx2.InvalidURL as fault:
        raise SettingsError(f"{origin} {text!r} is no URL: {fault}") from fault
    if url.scheme not in ("http", "https") or not url.host or set("?# ") & set(text):
        raise SettingsError(f"{origin} {text!r}: expected a URL such as {DEFAULT}")
    if url.userinfo:
        raise SettingsError(f"{origin}: a key is given by --key-file or {settings.API_KEY}")
    return str(url).rstrip("/").removesuffix("/v1")


def _only_line(path: Path) -> str:
    """The key in a file that holds nothing else."""
    try:
        text = given_files.content(path, KEY_BYTES).decode().strip()
    except OSError as fault:
        raise SettingsError(f"cannot read the key file {path}: {fault.strerror}") from fault
    except UnicodeDecodeError as fault:
        raise SettingsError(f"{path} is no UTF-8 text; expected a file that holds a key") from fault
    parts = text.split(":", 2)
    if len(parts) == len(("name", "scopes", "key")) and set(parts[1].split(",")) <= set(SCOPES):
        raise SettingsError(
            f"{path} holds NAME:SCOPES:KEY, as a server's key file; expected the key alone"
        )
    if not text:
        raise SettingsError(f"{path} is empty; expected a file that holds a key")
    return text


class Connection:
    """An open client; use as an async context manager."""

    def __init__(self, to: Address) -> None:
        self.address = to
        trust: ssl.SSLContext | bool = True
        if to.cacert is not None:
            given_files.check_plain(to.cacert)
            try:
                trust = ssl.create_default_context(cafile=str(to.cacert))
            except OSError as fault:  # also what is no certificate
                raise SettingsError(f"--cacert {to.cacert}: {fault.strerror or fault}") from fault
        headers = {"accept-encoding": "identity"}  # so that a bound on bytes is one on memory
        if to.key:
            headers["authorization"] = f"Bearer {to.key}"
        self._client = httpx2.AsyncClient(
            headers=headers,
            verify=trust,
            timeout=httpx2.Timeout(SILENCE_S, connect=CONNECT_S),
            trust_env=not to.is_here,  # a proxy of the environment's does not reach our loopback
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def get(self, path: str) -> dict[str, Any]:
        """The JSON object at `path`."""
        return await self.send("GET", path)

    async def text(self, path: str) -> str:
        """Whatever is at `path`, as text."""
        async with self._asked("GET", path, None, ANSWER_S) as response:
            return (await _read(response)).decode(errors="replace")

    async def send(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        within_s: float | None = ANSWER_S,
    ) -> dict[str, Any]:
        """The JSON object that a request is answered with, within so many seconds."""
        async with self._asked(method, path, body, within_s) as response:
            return self._object(await _read(response))

    async def events(self, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The JSON objects of a stream, up to its [DONE]. ServerError where it ends without."""
        async with self._asked("POST", path, body, None) as response:
            async for event in httpx2.EventSource(response):
                if event.data == "[DONE]":
                    return
                told = self._object(event.data)
                if "error" in told:
                    raise ServerError(_words(told))
                yield told
        raise ServerError("the connection was closed before the answer's end")

    @asynccontextmanager
    async def _asked(
        self, method: str, path: str, body: dict[str, Any] | None, within_s: float | None
    ) -> AsyncIterator[httpx2.Response]:
        """The response to a request, if it is a good one; to be read within so many seconds."""
        url = self.address.url + path
        try:
            async with (
                asyncio.timeout(within_s),
                self._client.stream(method, url, json=body) as response,
            ):
                if not response.is_success:
                    raise self._refusal(response, await _read(response))
                yield response
        except httpx2.ConnectError as fault:
            raise self._unreachable(fault) from fault
        except (httpx2.TimeoutException, TimeoutError) as fault:
            raise ServerError(f"{self.address.url} does not answer; it may be busy") from fault
        except httpx2.TransportError as fault:
            raise ServerError(
                f"{self.address.url}: {plain(fault) or type(fault).__name__}"
            ) from fault

    def _refusal(self, response: httpx2.Response, content: bytes) -> ServerError:
        told, status = _parsed(content), response.status_code
        error = told.get("error")
        if not isinstance(error, dict):
            detail = plain(told.get("detail", "")) or response.reason_phrase
            return ServerError(
                f"{response.url} answered {status}: {detail}; is it a quantserve?", status
            )
        words = _words(told)
        if status == httpx2.codes.UNAUTHORIZED:
            words += f" (by --key-file FILE or {settings.API_KEY})"
        param, code = error.get("param"), error.get("code")
        return ServerError(words, status, str(code), param if isinstance(param, str) else None)

    def _unreachable(self, fault: httpx2.ConnectError) -> ServerError:
        url, why = self.address.url, plain(_cause(fault))
        if "CERTIFICATE_VERIFY_FAILED" in why:
            return ServerError(f"{url} is not trusted: {why}; give its CA's file as --cacert")
        return ServerError(
            f"no server answers at {url}: {why}; start one by `quantserve serve`, or name one by"
            f" --server or {settings.SERVER}"
        )

    def _object(self, content: bytes | str) -> dict[str, Any]:
        told = _parsed(content)
        if not told:
            raise ServerError(f"{self.address.url} answered no JSON object; is it a quantserve?")
        return told


async def _read(response: httpx2.Response) -> bytes:
    content = bytearray()
    async for piece in response.aiter_raw():
        content += piece
        if len(content) > ANSWER_BYTES:
            raise ServerError(f"an answer of more than {ANSWER_BYTES >> 20} MiB is not read")
    return bytes(content)


def _cause(fault: BaseException) -> str:
    """The operating system's words, which libraries wrap."""
    while (inner := fault.__cause__ or fault.__context__) is not None:
        fault = inner.exceptions[0] if isinstance(inner, BaseExceptionGroup) else inner
    if isinstance(fault, ConnectionError) and fault.errno:
        return os.strerror(fault.errno)  # asyncio has put a sentence in its place
    return (isinstance(fault, OSError) and fault.strerror) or str(fault)


def _parsed(content: bytes | str) -> dict[str, Any]:
    """A JSON object; an empty one where it is anything else."""
    try:
        told = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _words(told: dict[str, Any]) -> str:
    """The message of an error in OpenAI's shape."""
    error = told["error"]
    message = error.get("message") if isinstance(error, dict) else error
    return plain(message or "the server says no reason")


def plain(said: object) -> str:
    """Somebody else's words as one line that does nothing to a terminal."""
    return tame(" ".join(str(said).split()))[:SHOWN]


def tame(text: str) -> str:
    """Text without control characters but tabs and line feeds: a terminal would obey them."""
    return _CONTROL.sub("", text)


class Signals:
    """In there Ctrl-C and SIGTERM are a KeyboardInterrupt, which asyncio.Runner makes of a
    cancellation: never an exception in the middle of somebody's bookkeeping."""

    def __init__(self) -> None:
        self.terminated = False

    def __enter__(self) -> Self:
        self._before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, self._terminate)
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _terminate(self, _number: int, _frame: FrameType | None) -> None:
        self.terminated = True
        signal.raise_signal(signal.SIGINT)


def run(work: Coroutine[Any, Any, T], left: str) -> T:
    """Its result; Interrupted, with `left` as what a user should know then, on a signal."""
    try:
        with Signals(), asyncio.Runner() as runner:
            return runner.run(work)
    except KeyboardInterrupt:
        stopped = Interrupted()
        stopped.add_note(left)
        raise stopped from None
