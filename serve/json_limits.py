"""What a JSON body may hold before it is parsed: values, objects, depth, and text that is text.

Parsing and checking a body holds the loop, and with it every stream: 10 million token ids do so
for 7 seconds, 100,000 messages for 3. Here they are counted by passes over bytes that take
milliseconds, with strings left out. The body is read whole and handed on as it came.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from serve.errors import BadRequest, EncodedBody
from serve.settings import Settings

Message = MutableMapping[str, Any]
Item = Callable[[Any], object]  # ValueError where it is none
Receive = Callable[[], Awaitable[Message]]

SLICE = 1 << 20  # bytes between two looks of the loop at everything else
MANY = 20  # items that may be bad all at once
PAIR = len(r"\ud83d\ude00")
BODILESS = ("GET", "HEAD", "OPTIONS")
NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
HALF_A_PAIR = re.compile(  # an escaped surrogate without its other half
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
)


@dataclass(frozen=True, slots=True)
class JsonLimits:
    values: int = 200_000  # numbers, strings and so on, of lists and objects
    objects: int = 10_000  # objects and lists: messages, their parts, the nodes of schemas
    depth: int = 64


def limits_of(settings: Settings) -> JsonLimits:
    return JsonLimits(values=settings.max_json_values)


async def measured(
    scope: Mapping[str, Any], receive: Receive, limits: JsonLimits, item: Item | None = None
) -> Receive:
    """`receive` again, its body read and found within `limits`. BadRequest where it is not,
    EncodedBody for one that would have to be unpacked first.

    `item` checks one of `input`, where a route takes many that may be many things.
    """
    if scope["type"] != "http" or scope["method"] in BODILESS or _is_form(scope):
        return receive
    codings = [value for name, value in scope["headers"] if name == b"content-encoding"]
    if any(coding.strip().lower() not in (b"", b"identity") for coding in codings):
        told = ascii(b", ".join(codings).decode("latin-1"))[:80]
        raise EncodedBody(f"the body's Content-Encoding is {told}; send it as it is")
    kept = [await receive()]
    while kept[-1]["type"] == "http.request" and kept[-1].get("more_body"):
        kept.append(await receive())
    body = b"".join(message.get("body", b"") for message in kept)
    if kept[-1]["type"] == "http.request":
        await check(body, limits)
        if item is not None:
            await check_items(body, item)
        kept = [{"type": "http.request", "body": body, "more_body": False}]
    kept.reverse()

    async def again() -> Message:
        return kept.pop() if kept else await receive()

    return again


async def check(body: bytes, limits: JsonLimits) -> None:
    """BadRequest for a body that would hold the loop, or that is no UTF-8."""
    _check_encoding(body)
    await _check_pairs(body)
    values = objects = depth = 0
    inside, start = False, 0
    while start < len(body):
        end = _end_of_slice(body, start)
        outside, inside = _without_strings(body[start:end], inside=inside)
        brackets = outside.translate(None, NOT_BRACKETS)
        objects += brackets.count(b"{") + brackets.count(b"[")
        values += outside.count(b",")
        if values > limits.values:
            raise BadRequest(
                f"the body holds more than {limits.values:,} values, which this server takes at "
                "most (QUANTSERVE_MAX_JSON_VALUES)"
            )
        if objects > limits.objects:
            raise BadRequest(f"the body holds more than {limits.objects:,} objects and lists")
        depth = _check_depth(brackets, depth, limits.depth)
        start = end
        if start < len(body):
            await asyncio.sleep(0)


async def check_items(body: bytes, item: Item) -> None:
    """BadRequest for the first of many items of `input` that is none.

    Pydantic tries every item as each of some thirty kinds and keeps what it has against each: a
    thousand bad ones hold the loop for six seconds. One at a time they end with the first.
    """
    try:
        asked = json.loads(body)
    except ValueError:
        return  # whoever parses it says so
    items = asked.get("input") if isinstance(asked, dict) else None
    if not isinstance(items, list) or len(items) < MANY:
        return
    for place, one in enumerate(items):
        try:
            item(one)
        except ValueError as fault:
            raise BadRequest(
                f"input[{place}] is no item of a conversation: see its type, role and content",
                param=f"input[{place}]",
            ) from fault
        if place % MANY == 0:
            await asyncio.sleep(0)


def check_text(text: str) -> None:
    """BadRequest for JSON in a string, such as a call's arguments, that is nested too deep."""
    outside, _ = _without_strings(text.encode(errors="replace"), inside=False)
    _check_depth(outside.translate(None, NOT_BRACKETS), 0, JsonLimits().depth)


def _is_form(scope: Mapping[str, Any]) -> bool:
    """A form's file is no JSON; its parser reads on as it comes."""
    kinds = [value for name, value in scope["headers"] if name == b"content-type"]
    return any(kind.lower().startswith(b"multipart/") for kind in kinds)


def _check_encoding(body: bytes) -> None:
    """Python's parser takes UTF-16, and surrogates as bytes, which nothing behind it can write."""
    try:
        body.decode()
    except UnicodeDecodeError as fault:
        raise BadRequest(f"the body is not UTF-8: {fault.reason} at byte {fault.start}") from fault
    if json.detect_encoding(body) not in ("utf-8", "utf-8-sig"):
        raise BadRequest("the body is JSON in another encoding; send UTF-8")


async def _check_pairs(body: bytes) -> None:
    if b"\\u" not in body:
        return
    text = body.replace(b"\\\\", b"")
    for start in range(0, len(text), SLICE):
        half = HALF_A_PAIR.search(text, start, start + SLICE + PAIR)
        if half and half.start() < start + SLICE:
            raise BadRequest(
                f"the text holds {half.group()[:5].decode()}.., half of a surrogate pair: a "
                "character that was cut in two"
            )
        if len(text) > SLICE:
            await asyncio.sleep(0)


def _end_of_slice(body: bytes, start: int) -> int:
    """Where a slice may end: not behind a backslash, whose character belongs to it."""
    end = min(start + SLICE, len(body))
    while end < len(body) and body[end - 1] == ord("\\"):
        end += 1
    return end


def _without_strings(piece: bytes, *, inside: bool) -> tuple[bytes, bool]:
    """What of `piece` is outside of strings; and whether it ends within one, as it may begin."""
    parts = piece.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
    return b"".join(parts[inside::2]), inside ^ (len(parts) % 2 == 0)


def _check_depth(brackets: bytes, depth: int, most: int) -> int:
    for bracket in brackets:
        depth += 1 if bracket in b"{[" else -1
        if depth > most:
            raise BadRequest(f"JSON is nested deeper than {most} objects and lists")
    return depth
