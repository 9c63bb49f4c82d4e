"""What is wrong with a body is one sentence about a field that the client knows."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError

from serve.validation import explain


def said(model: Any, body: Any) -> tuple[str, str | None]:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(model).validate_python(body)
    errors = [{**e, "loc": ("body", *e["loc"])} for e in caught.value.errors()]
    return explain(errors, body)


def test_a_missing_field_is_named_as_the_client_knows_it() -> None:
    assert said(ChatCompletionRequest, {"model": "m"}) == (
        "messages: this field is required",
        "messages",
    )


def test_of_the_branches_of_a_union_the_field_is_told() -> None:
    body = {"messages": [{"role": "user", "content": None}]}
    message, field = said(ChatCompletionRequest, body)
    assert field == "messages[0].content"
    assert message.startswith("messages[0].content: ") and len(message) < 200
    assert "Param" not in message and "function-" not in message


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"messages": [], "temperature": "hot"}, "temperature"),
        ({"messages": [], "stop": {"a": 1}}, "stop"),
        (
            {"messages": [], "stream": True, "stream_options": {"include_usage": []}},
            "stream_options.include_usage",
        ),
        ({"messages": [], "n": [1]}, "n"),
    ],
)
def test_the_field_is_one_that_the_request_has(body: dict[str, Any], field: str) -> None:
    message, named = said(ChatCompletionRequest, body)
    assert named == field and message.startswith(f"{field}: ")


def test_a_check_of_vllms_names_its_own_field() -> None:
    fault = VLLMValidationError("it is too much", parameter="top_logprobs", value=99)
    told = {"type": "value_error", "loc": ("body",), "msg": "x", "ctx": {"error": fault}}
    assert explain([told], {}) == ("it is too much", "top_logprobs")


class Two(BaseModel):
    a: int
    b: list[int] = Field(max_length=2)


def test_several_fields_are_told_at_once_and_bounded() -> None:
    message, field = said(Two, {"b": [1, 2, 3]})
    assert field == "a" and "also wrong: b" in message
    message, field = said(list[int], ["x"] * 50_000)
    assert field == "[0]" and len(message) < 300


@pytest.mark.parametrize("body", [None, [], "text", 5])
def test_a_body_that_is_no_object_is_told_as_such(body: Any) -> None:
    message, field = said(Two, body)
    assert field is None and message == "the body: input should be a valid object"


def test_a_body_that_is_no_json_and_errors_that_are_words() -> None:
    broken = {"type": "json_invalid", "loc": ("body", 3), "ctx": {"error": "Expecting value"}}
    assert explain([broken], None) == ("the body is not JSON: Expecting value", None)
    assert explain(["Unsupported Media Type"], None) == ("Unsupported Media Type", None)
    assert explain([], None)[0]
