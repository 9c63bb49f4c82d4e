"""Error bodies leave in OpenAI's shape, whoever made them."""

from __future__ import annotations

import json

from serve.errors import ModelNotFound
from serve.wire import openai_error


def test_vllms_integer_code_becomes_a_word() -> None:
    raw = {"error": {"message": "no", "type": "NotFoundError", "param": "model", "code": 404}}
    status, body = openai_error(404, json.dumps(raw).encode(), "/v1/chat/completions")
    assert status == 404
    assert body["error"] == {
        "message": "no", "type": "invalid_request_error", "param": "model",
        "code": "model_not_found",
    }  # fmt: skip


def test_fastapis_validation_error_becomes_400_with_the_field() -> None:
    detail = [{"loc": ["body", "path"], "msg": "Field required", "type": "missing"}]
    status, body = openai_error(422, json.dumps({"detail": detail}).encode(), "/admin/adapters/a")
    assert status == 400
    assert body["error"]["param"] == "path" and "Field required" in body["error"]["message"]


def test_an_unknown_route_is_named() -> None:
    status, body = openai_error(404, b'{"detail":"Not Found"}', "/v1/nothing")
    assert (status, body["error"]["code"]) == (404, "not_found")
    assert "/v1/nothing" in body["error"]["message"]


def test_a_long_prompt_has_openais_own_code() -> None:
    raw = {"error": {"message": "This model's maximum context length is 8 tokens", "code": 400}}
    _, body = openai_error(400, json.dumps(raw).encode(), "/v1/completions")
    assert body["error"]["code"] == "context_length_exceeded"


def test_plain_text_and_empty_bodies_get_a_message() -> None:
    assert openai_error(500, b"boom", "/")[1]["error"]["message"] == "boom"
    assert openai_error(405, b"", "/")[1]["error"]["message"] == "Method Not Allowed"


def test_our_own_errors_pass_unchanged() -> None:
    ours = ModelNotFound("gone", param="model").body()
    assert openai_error(404, json.dumps(ours).encode(), "/") == (404, ours)
