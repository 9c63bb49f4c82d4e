"""What OpenAI's own client sees: answers, streams, usage, and errors it can read."""

from __future__ import annotations

from pathlib import Path

import httpx
import openai
import pytest

from tests.e2e.server import APP_KEY, GREEDY, QUESTION, Answer, Server, chat

pytestmark = pytest.mark.e2e


def test_a_stream_is_the_answer_in_pieces_and_ends_with_usage(server: Server) -> None:
    with server.client(APP_KEY) as client:
        stream = client.chat.completions.create(
            model="base",
            messages=chat(),
            stream=True,
            stream_options={"include_usage": True},
            **GREEDY,
        )
        chunks = list(stream)
    choices = [choice for chunk in chunks for choice in chunk.choices]
    said = Answer.of(t for c in choices if c.logprobs for t in c.logprobs.content or ())
    assert said.is_as(server.answer("base")), said
    assert "".join(choice.delta.content or "" for choice in choices) in str(said)
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert {chunk.model for chunk in chunks} == {"base"}


def test_completions_logprobs_and_structured_output_are_vllms(server: Server) -> None:
    with server.client() as client:
        plain = client.completions.create(
            model="base", prompt="The capital of France is", max_tokens=3, logprobs=2
        )
        shaped = client.chat.completions.create(
            model="base",
            messages=[{"role": "user", "content": "Is Paris in France?"}],
            max_tokens=8,
            extra_body={"structured_outputs": {"choice": ["yes", "no"]}},
        )
        responded = client.responses.create(model="base", input=QUESTION, max_output_tokens=16)
    assert plain.choices[0].logprobs is not None
    assert shaped.choices[0].message.content in ("yes", "no")
    assert responded.status in ("completed", "incomplete")


def test_doubled_and_trailing_slashes_are_forgiven(api: httpx.Client) -> None:
    expected = api.get("/v1/models").json()
    assert api.get("/v1//models").json() == expected
    assert api.get("/v1/models/").json() == expected


def test_a_wrong_key_is_401(server: Server) -> None:
    with (
        server.client("sk-nobody-knows-this-one") as client,
        pytest.raises(openai.AuthenticationError) as refusal,
    ):
        client.models.list()
    assert refusal.value.code == "invalid_api_key"


def test_an_unknown_model_is_404(server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as refusal:
        server.answer("nobody")
    assert (refusal.value.code, refusal.value.param) == ("model_not_found", "model")


def test_inference_keys_do_not_administer(server: Server) -> None:
    headers = {"authorization": f"Bearer {APP_KEY}"}
    answer = httpx.get(f"{server.url}/admin/adapters", headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "insufficient_scope")


def test_bad_requests_are_400_with_a_reason(api: httpx.Client) -> None:
    for body in ({"model": "base"}, {"model": "base", "messages": "hi", "max_tokens": -1}):
        answer = api.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400
        fault = answer.json()["error"]
        assert fault["message"] and isinstance(fault["code"], str)


def test_too_long_a_prompt_is_named_so(api: httpx.Client) -> None:
    body = {"model": "base", "prompt": "word " * 20_000, "max_tokens": 1}
    answer = api.post("/v1/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_models_list_base_and_aliases_without_paths(server: Server, loras: list[Path]) -> None:
    with server.client() as client:
        models = {model.id: model for model in client.models.list()}
        one = client.models.retrieve("first")
    assert {"base", "first"} <= set(models)
    assert one.id == "first" and str(loras[0]) not in one.model_dump_json()
