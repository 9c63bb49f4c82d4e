"""What a body may hold, told from its bytes alone and without taking text for structure."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serve.errors import BadRequest, EncodedBody
from serve.json_limits import SLICE, JsonLimits, check, check_items, measured
from serve.vllm_compat import response_item

LIMITS = JsonLimits(values=100, objects=20, depth=8)


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (dumped(list(range(200))), "more than 100 values.*QUANTSERVE_MAX_JSON_VALUES"),
        (dumped([{}] * 30), "more than 20 objects"),
        (dumped([[[[[[[[[1]]]]]]]]]), "deeper than 8"),
        (b'{"a":' * 9, "deeper than 8"),
        (dumped({"p": "x", "q": list(range(200))}), "values"),
        (b'["\\\\", ' + b"1," * 200 + b'"', "values"),  # the string ends at its third quote
        (dumped({"a": 1}).decode().encode("utf-16-le"), "another encoding"),
        (dumped({"a": 1}).decode().encode("utf-16"), "not UTF-8"),
        (b'{"stop": "\xed\xa0\x80"}', "not UTF-8"),
        (b'{"stop": "\\ud800"}', "half of a surrogate pair"),
        (b'{"stop": "\\ud83d\\ud83d\\ude00"}', "half of a surrogate pair"),
        (b'{"stop": "\\ude00"}', "half of a surrogate pair"),
        (b'{"stop": "\\\\\\ud800"}', "half of a surrogate pair"),
        (dumped("x" * (SLICE - 12)) + b',"\\ud800"', "half of a surrogate pair"),
    ],
)
async def test_what_is_over_a_limit_is_told(body: bytes, said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        await check(body, LIMITS)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json at all",
        dumped({"messages": [{"role": "user", "content": "[{,}]" * 1000}]}),
        dumped({"code": '\\"' * 500 + "[[[[[[[[[[" + ",,," * 100}),
        dumped({"code": "\\"}) + b" " * 10,
        dumped({"text": "\\ud800 is half a pair, \\\\ud800 too"}),
        dumped({"text": "\U0001f600" * 1000}),
        '{"text": "😀"}'.encode("utf-8-sig"),
    ],
)
async def test_text_is_no_structure(body: bytes) -> None:
    await check(body, LIMITS)


@pytest.mark.parametrize("shift", range(14))
async def test_a_slice_may_end_anywhere(shift: int) -> None:
    """Within an escape, a pair, a string: what is counted is the same."""
    pad = b'{"a": "' + b"x" * (SLICE - 20 + shift)
    await check(pad + b'\\\\\\"[[[[[[[[[[\\ud83d\\ude00", "b": [1, 2]}', LIMITS)
    with pytest.raises(BadRequest, match="values"):
        await check(pad + b'\\\\\\"\\\\", "b": [' + b"1," * 200 + b"1]}", LIMITS)


async def replayed(scope: dict[str, Any], *messages: dict[str, Any]) -> list[dict[str, Any]]:
    waiting = list(messages)

    async def receive() -> Any:
        return waiting.pop(0)

    again = await measured({"headers": [], **scope}, receive, LIMITS)
    return [dict(await again()) for _ in range(len(messages) if waiting else 1)]


async def test_a_body_that_is_packed_is_refused_by_what_it_is_packed_in() -> None:
    post = {"type": "http", "method": "POST"}
    body = {"type": "http.request", "body": b"{}", "more_body": False}
    for coding in (b"gzip", b"br, gzip", b"X" * 5000):
        with pytest.raises(EncodedBody, match=r"Content-Encoding is '.*send it as it is"):
            await replayed({**post, "headers": [(b"content-encoding", coding)]}, body)
    assert await replayed({**post, "headers": [(b"content-encoding", b"Identity")]}, body) == [body]


async def test_a_body_is_handed_on_whole() -> None:
    post = {"type": "http", "method": "POST"}
    pieces = [{"type": "http.request", "body": piece, "more_body": piece != b"]"}
              for piece in (b"[1", b", 2", b"]")]  # fmt: skip
    (whole,) = await replayed(post, *pieces)
    assert whole == {"type": "http.request", "body": b"[1, 2]", "more_body": False}
    gone = {"type": "http.disconnect"}
    (first,) = await replayed(post, pieces[0], gone)
    assert first == pieces[0]  # and then that the client has gone, as it came
    form = {**post, "headers": [(b"content-type", b"multipart/form-data; boundary=x")]}
    big = {"type": "http.request", "body": b"[" * 100, "more_body": False}
    assert await replayed(form, big, gone) == [big, gone]
    assert await replayed({"type": "http", "method": "GET"}, big, gone) == [big, gone]


async def test_of_many_items_the_first_that_is_none_ends_it() -> None:
    """Pydantic would hold what it has against each of them, for seconds."""
    item, good = response_item(), {"role": "user", "content": "hi"}
    await check_items(dumped({"input": [good] * 1000}), item)
    await check_items(dumped({"input": "hi"}), item)
    await check_items(b"{", item)
    looked = 0

    def counted(one: Any) -> object:
        nonlocal looked
        looked += 1
        return item(one)

    with pytest.raises(BadRequest) as caught:
        await check_items(dumped({"input": [good] * 30 + [{"type": "banana"}] * 3000}), counted)
    assert caught.value.param == "input[30]" and looked == 31
