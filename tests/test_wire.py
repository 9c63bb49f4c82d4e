"""Error bodies leave in the shape of their API, whoever made them, and say something."""

from __future__ import annotations

import json

import pytest

from serve import wire
from serve.errors import AdapterSlotsFull, ModelNotFound, ServeError
from serve.wire import (
    ANTHROPIC_TYPES,
    FAILED,
    MESSAGE_LIMIT,
    Told,
    dialect_of,
    error_event,
    read_error,
    told_of,
)

OPENAI_FIELDS = ["message", "type", "param", "code"]


def openai_error(status: int, raw: bytes, path: str = "/v1/chat/completions") -> dict[str, object]:
    told = read_error(status, raw, path)
    fault: dict[str, object] = dialect_of(path).body(told, "r1")["error"]
    return {**fault, "status": told.status}


def vllms(message: str, status: int, param: str | None = None) -> bytes:
    fault = {"message": message, "type": "SomeError", "param": param, "code": status}
    return json.dumps({"error": fault}).encode()


def test_vllms_integer_code_becomes_a_word() -> None:
    assert openai_error(404, vllms("no", 404, "model")) == {
        "status": 404, "message": "no", "type": "invalid_request_error", "param": "model",
        "code": "model_not_found",
    }  # fmt: skip


def test_fastapis_validation_error_becomes_400_with_the_field() -> None:
    detail = [{"loc": ["body", "path"], "msg": "Field required", "type": "missing"}]
    fault = openai_error(422, json.dumps({"detail": detail}).encode(), "/admin/adapters/a")
    assert (fault["status"], fault["param"]) == (400, "path")
    assert "Field required" in str(fault["message"])


def test_an_unknown_route_is_named() -> None:
    fault = openai_error(404, b'{"detail":"Not Found"}', "/v1/nothing")
    assert (fault["status"], fault["code"]) == (404, "not_found")
    assert "/v1/nothing" in str(fault["message"])


def test_a_long_prompt_has_openais_own_code() -> None:
    fault = openai_error(400, vllms("This model's maximum context length is 8 tokens", 400))
    assert fault["code"] == "context_length_exceeded"


def test_our_own_errors_pass_unchanged() -> None:
    ours = ModelNotFound("gone", param="model")
    told = read_error(404, json.dumps(ours.body()).encode(), "/")
    assert told == told_of(ours)
    assert dialect_of("/").body(told, "r1") == ours.body()


def test_plain_text_gets_a_shape() -> None:
    assert openai_error(405, b"")["message"] == "Method Not Allowed"
    assert list(openai_error(500, b"boom"))[:4] == OPENAI_FIELDS
    assert openai_error(500, b"boom")["message"] == "boom"


@pytest.mark.parametrize(
    "raw",
    [b"", b"{}", b"[]", b"null", b'{"error": null}', b'{"error": {}}', b'{"error": ""}',
     b'{"error": {"message": null}}', b'{"error": {"message": " "}}', b'{"message": ""}',
     b'{"error": {"message": "", "code": "internal_error"}}', b'{"error": {"message": {"a": 1}}}',
     b"\xff\xfe", b"[" * 5000, vllms("", 500), vllms("Internal server error", 500)],
)  # fmt: skip
@pytest.mark.parametrize("status", [400, 404, 500, 503])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_no_error_leaves_without_a_word(raw: bytes, status: int, path: str) -> None:
    told = read_error(status, raw, path)
    assert told.message.strip() and isinstance(told.code, str) and told.code
    assert dialect_of(path).body(told, "r1")["error"]["message"].strip()


@pytest.mark.parametrize(
    "said",
    ["'content'", "KeyError('role')", "'NoneType' object has no attribute 'get'",
     "<class 'list'> is wrong", "TypeError: f() got an unexpected keyword argument 'x'",
     "1 validation error for Request\nmessages\n  Field required [type=missing, input_value={'a': "
     "1}, input_type=dict]\n    For further information visit https://errors.pydantic.dev/2/v/x",
     "'int' object is not subscriptable",
     "TextEncodeInput must be Union[TextInputSequence, Tuple[InputSequence, InputSequence]]",
     "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
     "'utf-8' codec can't encode character '\\ud800' in position 0: surrogates not allowed"],
)  # fmt: skip
@pytest.mark.parametrize("status", [400, 500])
def test_what_python_says_to_itself_is_not_told(said: str, status: int) -> None:
    message = str(openai_error(status, vllms(said, status))["message"])
    for trace in ("<class", "NoneType", "KeyError(", "input_type", "Union[", "codec", "pydantic",
                  "object has no", "'content'"):  # fmt: skip
        assert trace not in message
    assert len(message) > 20


def test_of_pydantics_path_the_fields_are_left() -> None:
    said = (
        "2 validation errors for ValidatorIterator\n0.ContentPartTextParam.text\n  Field required "
        "[type=missing, input_value={}, input_type=dict]\n    For further information visit https://x"
        "\n0.list[int]\n  Input should be a valid list [type=list_type, input_type=dict]"
    )
    assert openai_error(400, vllms(said, 400))["message"] == (
        "0.text: Field required; 0: Input should be a valid list"
    )


def test_a_plain_refusal_keeps_its_words() -> None:
    assert openai_error(400, vllms("no stop (parameter=stop, value=[1, 2])", 400))["message"] == (
        "no stop"
    )
    for said in ("max_tokens must be at least 1, got 0.", "temperature must be non-negative"):
        assert openai_error(400, vllms(said, 400))["message"] == said


def test_long_echoes_are_cut_and_keep_their_end() -> None:
    said = f"The model `{'m' * 2_000_000}` does not exist. Valid aliases: base."
    fault = openai_error(404, vllms(said, 404, "p" * 100_000))
    assert len(str(fault["message"])) < MESSAGE_LIMIT + 100
    assert str(fault["message"]).endswith("Valid aliases: base.")
    assert len(str(fault["param"])) < MESSAGE_LIMIT + 100
    assert len(told_of(ServeError("x" * 2_000_000)).message) < MESSAGE_LIMIT + 100


@pytest.mark.parametrize(
    "said", ["m", "<", "1 validation error for X\n", "'", " [type=", "a.", "\n"]
)
def test_reading_an_error_takes_no_longer_than_its_length(said: str) -> None:
    """A pattern that backtracks would take hours for these."""
    for status in (400, 500):
        assert openai_error(status, vllms(said * 1_000_000, status))["message"]


def test_vllms_path_of_a_field_is_the_requests() -> None:
    assert openai_error(400, vllms("no", 400, "body.messages"))["param"] == "messages"
    assert openai_error(400, vllms("no", 400, "body."))["param"] is None


@pytest.mark.parametrize("status", sorted(ANTHROPIC_TYPES))
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_anthropics_routes_speak_anthropic(status: int, path: str) -> None:
    body = dialect_of(path).body(read_error(status, vllms("no", status), path), "r1")
    assert body["type"] == "error" and body["request_id"] == "r1"
    assert body["error"]["type"] == ANTHROPIC_TYPES[status]
    assert set(body["error"]) == {"type", "message"}


def test_other_statuses_have_anthropics_general_types() -> None:
    kinds = {
        status: dialect_of("/v1/messages").body(read_error(status, b"x", "/"), "")["error"]["type"]
        for status in (405, 409, 418, 500, 502, 507)
    }
    assert set(kinds.values()) == {"invalid_request_error", "api_error"}
    assert kinds[418] == "invalid_request_error" and kinds[502] == "api_error"


def test_a_lookalike_of_anthropics_route_is_openais() -> None:
    assert dialect_of("/v1/messagesx").body(told_of(ServeError("x")), "")["error"]["code"]


@pytest.mark.parametrize(
    "chunk",
    [
        b'data: {"error": {"message": "m", "type": "X", "param": null, "code": 500}}\n\n',
        b'data: {"error":{"message":"m","code":500}}\n\ndata: [DONE]\n\n',
        b'data: {"id": 1}\n\ndata: {"error": {"message": "m"}}\n\n',
        b'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"m"}}\n\n',
        b'event: error\ndata: {"type":"error","message":"m","code":"server_error"}\n\n',
    ],
)
def test_an_error_event_is_seen(chunk: bytes) -> None:
    found = error_event(chunk)
    assert found is not None and (found.status, found.message) == (500, "m")


@pytest.mark.parametrize(
    "chunk",
    [
        b'data: {"id":"1","choices":[{"delta":{"content":"data: {\\"error\\": 1}"}}]}\n\n',
        b'data: {"id":"1","choices":[{"delta":{"content":"event: error"}}]}\n\n',
        b'event: response.completed\ndata: {"response":{"error":null}}\n\n',
        b": keep-alive\n\n", b"data: [DONE]\n\n", b"",
    ],
)  # fmt: skip
def test_a_text_about_errors_is_none(chunk: bytes) -> None:
    assert error_event(chunk) is None


@pytest.mark.parametrize("given", [b'{"error": "x"}', b'{"error": [1]}', b"not json", b'{"error"'])
def test_an_error_event_of_any_form_is_read(given: bytes) -> None:
    found = error_event(b"event: error\ndata: " + given + b"\n\n")
    assert found is not None and found.message and found.status == 500


def event(path: str, told: Told) -> tuple[list[str], dict[str, object]]:
    *named, data = dialect_of(path).event(told, "r1", 7).decode().strip().split("\n")
    return named, json.loads(data.removeprefix("data: "))


def test_each_api_has_its_own_error_event() -> None:
    told = told_of(AdapterSlotsFull("full"))
    named, chat = event("/v1/chat/completions", told)
    assert named == [] and list(chat) == ["error"] and chat["error"] == told.fields()
    named, responses = event("/v1/responses", told)
    assert named == ["event: error"] and responses["type"] == "error"
    assert responses["sequence_number"] == 7 and responses["code"] == "adapter_slots_full"
    assert responses["error"] == told.fields()
    named, messages = event("/v1/messages", told)
    assert named == ["event: error"] and messages["request_id"] == "r1"
    assert messages["error"] == {"type": "overloaded_error", "message": "full"}


def test_an_error_of_ours_without_words_says_where_to_look() -> None:
    assert told_of(ServeError("")).message == FAILED


@pytest.mark.parametrize(
    ("message", "asked", "field"),
    [
        ("n must be at least 1, got 0.", {"model", "prompt", "n"}, "n"),
        ("min_tokens must be less than or equal to max_tokens=2.", {"min_tokens", "max_tokens"},
         "min_tokens"),
        ("Token id 49152 is out of vocabulary", {"prompt", "model"}, "prompt"),
        ("The decoder prompt cannot be empty", {"input", "model"}, "input"),
        ("base is not a multimodal model", {"messages", "model"}, "messages"),
        ("0.text: Field required", {"messages"}, "messages"),
        ("the engine is no place for this", {"messages", "model", "n"}, None),
        ("n must be at least 1, got 0.", set(), None),
    ],
)  # fmt: skip
def test_the_field_that_the_words_name_is_the_param(
    message: str, asked: set[str], field: str | None
) -> None:
    told = wire.read_error(400, vllms(message, 400), "/v1/completions")
    assert wire.with_field(told, asked).param == field
    other = wire.read_error(400, vllms(message, 400, "x"), "/v1/completions")
    assert wire.with_field(other, asked).param == "x"


def test_pythons_words_about_a_call_of_ours_are_not_told() -> None:
    said = "render_with.<locals>.apply() got multiple values for argument 'conversation'"
    told = wire.read_error(400, vllms(said, 400), "/v1/chat/completions")
    assert told.message == wire.UNREADABLE
