"""Tools as clients send them, with nothing switched on: where calls are read, and where not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from quant import tokens
from quant.conversation import Chat
from quant.records import Record
from tests import chats, tiny
from tests.e2e.server import APP_KEY, Server, serving
from tests.test_parsers import HERMES

pytestmark = pytest.mark.e2e

# What clients' own types would call by a dozen names is JSON here.
ASKED: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
FUNCTION = {"name": "weather", "description": "The weather of a city.", "parameters": SCHEMA}
TOOL: Any = {"type": "function", "function": FUNCTION}
FLAT: Any = {"type": "function", **FUNCTION}
NAMED = {"type": "function", "function": {"name": "weather"}}
CALL = 1  # the token `<tool_call>`


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is told of tools, and that calls one wherever it may."""
    made = tiny.model_folder(tmp_path_factory.mktemp("tiny") / "tiny", hidden=256,
                             dtype=torch.float32)  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (made / name).read_text("utf-8")
        (made / name).write_text(text.replace(tiny.EOS, "<tool_call>"), "utf-8")
    (made / "chat_template.jinja").write_text(HERMES)
    lean(made)
    return made


def lean(made: Path) -> None:
    """To calls, and not to the blanks that JSON allows everywhere; whatever the arithmetic."""
    vocabulary = json.loads((made / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    shown = str.maketrans("ĉĊčĠ", "\t\n\r ")
    blanks = [number for text, number in vocabulary.items() if not text.translate(shown).strip()]
    assert len(blanks) >= 4
    held = load_file(made / "model.safetensors")
    held["model.embed_tokens.weight"][:, 0] = 50.0  # a channel that is the same for every token
    held["lm_head.weight"][:, 0] = 0.0
    held["lm_head.weight"][blanks, 0] = -10.0
    held["lm_head.weight"][CALL, 0] = 10.0
    save_file(held, made / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def caller(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    small = ("--kv-cache-bytes", str(64 << 20), "--model-name", "base")
    with serving(model, tmp_path_factory.mktemp("caller"), *small) as started:
        started.until_ready()
        yield started


ASK: dict[str, Any] = {"model": "base", "messages": ASKED, "tools": [TOOL], "max_tokens": 200,
                       "temperature": 0, "parallel_tool_calls": False}  # fmt: skip


def post(server: Server, path: str, **body: Any) -> httpx.Response:
    with server.http() as api:
        return api.post(path, json=body)


def fits(arguments: str) -> bool:
    told = json.loads(arguments)
    return told.keys() == {"city", "days"} and told["city"] in ("Paris", "Rome")


def test_the_start_says_which_parser_was_picked(caller: Server, server: Server) -> None:
    assert "tool parser: hermes (the chat template writes <tool_call>" in caller.log.read_text()
    assert "tool parser: none (the chat template writes no tools)" in server.log.read_text()


@pytest.mark.parametrize("choice", [None, "auto", "required", NAMED])
def test_a_call_is_read_and_its_arguments_fit(caller: Server, choice: Any) -> None:
    body = ASK | ({"tool_choice": choice} if choice else {})
    with caller.client(APP_KEY) as client:
        reply = client.chat.completions.create(**body)
    (call,) = reply.choices[0].message.tool_calls or []
    assert call.type == "function" and call.function.name == "weather"
    assert fits(call.function.arguments)
    assert reply.choices[0].finish_reason == ("tool_calls" if choice != NAMED else "stop")


@pytest.mark.parametrize("choice", ["auto", "required", NAMED])
def test_a_streamed_call_is_the_same_in_pieces(caller: Server, choice: Any) -> None:
    with caller.client() as client:
        stream = client.chat.completions.create(**ASK, tool_choice=choice, stream=True)
        deltas = [choice.delta for chunk in stream for choice in chunk.choices]
    pieces = [call for delta in deltas for call in delta.tool_calls or []]
    names = [piece.function.name for piece in pieces if piece.function and piece.function.name]
    assert names == ["weather"] and pieces[0].id
    assert fits("".join(piece.function.arguments or "" for piece in pieces if piece.function))


def test_the_model_is_told_of_the_tools(caller: Server) -> None:
    without = {name: value for name, value in ASK.items() if "tool" not in name}
    counts = [post(caller, "/v1/chat/completions", **body | {"max_tokens": 1}).json()["usage"]
              for body in (ASK, without)]  # fmt: skip
    assert counts[0]["prompt_tokens"] > counts[1]["prompt_tokens"] + 50


@pytest.mark.parametrize("asks", [False, True], ids=["told", "asked"])
def test_calibration_has_the_tokens_that_the_server_sees(
    caller: Server, model: Path, server: Server, w4a16: Path, asks: Any
) -> None:
    """Of every conversation, through the template of a model with tools and of one without."""
    for running, folder in ((caller, model), (server, w4a16)):
        tokenizer = tokens.load_tokenizer(folder)
        for name in chats.CONVERSATIONS:
            body = chats.request(name)
            chat = Record.model_validate(body).document
            assert isinstance(chat, Chat)
            more = body.pop("chat_template_kwargs", {}), {"documents": body.pop("documents", None)}
            asked = {**body, "chat_template_kwargs": more[0] | more[1], "model": "base"}
            answer = post(running, "/tokenize", **asked, add_generation_prompt=asks)
            assert answer.status_code == httpx.codes.OK, answer.text
            expected = tokens.of_chat(chat, tokenizer, asks=asks)
            assert answer.json()["tokens"] == expected, (name, folder)


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "name": "weather"}])
def test_responses_give_function_calls(caller: Server, choice: Any) -> None:
    body: dict[str, Any] = {
        "model": "base", "input": "What is the weather?", "tools": [FLAT], "tool_choice": choice,
        "temperature": 0, "max_output_tokens": 200, "parallel_tool_calls": False,
    }  # fmt: skip
    with caller.client() as client:
        reply = client.responses.create(**body)
        (call,) = [item for item in reply.output if item.type == "function_call"]
        assert call.name == "weather" and fits(call.arguments)
        events = list(client.responses.create(**body, stream=True))
    (done,) = [e for e in events if e.type == "response.function_call_arguments.done"]
    assert fits(done.arguments)


def test_responses_refuse_tools_that_nobody_runs(caller: Server) -> None:
    with caller.client() as client, pytest.raises(openai.BadRequestError) as refusal:
        client.responses.create(model="base", input="News?", tools=[{"type": "web_search"}])
    assert refusal.value.param == "tools[0].type" and "web_search" in refusal.value.message


@pytest.mark.parametrize(
    "choice", [{"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "weather"}]
)
def test_messages_give_tool_use(caller: Server, choice: dict[str, Any]) -> None:
    tool = {"name": "weather", "description": "d", "input_schema": SCHEMA}
    body: dict[str, Any] = {
        "model": "base", "max_tokens": 200, "messages": ASKED, "tools": [tool], "temperature": 0,
        "tool_choice": choice | {"disable_parallel_tool_use": True},
    }  # fmt: skip
    answer = post(caller, "/v1/messages", **body)
    assert answer.status_code == 200, answer.text
    uses = [block for block in answer.json()["content"] if block["type"] == "tool_use"]
    streamed = post(caller, "/v1/messages", **body, stream=True).text
    assert answer.json()["stop_reason"] == "tool_use"
    assert [use["name"] for use in uses] == ["weather"] and fits(json.dumps(uses[0]["input"]))
    assert '"tool_use"' in streamed and '"input_json_delta"' in streamed


def test_a_schema_without_a_grammar_is_warned_of(caller: Server) -> None:
    odd = {"type": "object", "properties": {"city": {"type": "wizard"}}}
    tool = {"type": "function", "function": {"name": "odd", "parameters": odd}}
    answer = post(caller, "/v1/chat/completions", **ASK | {"tools": [tool, TOOL]})
    assert answer.status_code == 200, answer.text
    assert "'odd'" in answer.headers["x-quantserve-warning"]
    strict = {"type": "function", "function": {"name": "odd", "parameters": odd, "strict": True}}
    assert post(caller, "/v1/chat/completions", **ASK | {"tools": [strict]}).status_code == 400


@pytest.mark.parametrize("streams", [False, True])
def test_where_no_call_is_read_a_chat_goes_on_as_text(server: Server, *, streams: bool) -> None:
    """As front ends send it: tools with every message, and no word of a choice."""
    answer = post(server, "/v1/chat/completions", model="first", messages=ASKED, tools=[TOOL],
                  max_tokens=4, stream=streams)  # fmt: skip
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-quantserve-warning"].startswith("tools are ignored")
    assert (
        "x-quantserve-warning"
        not in post(
            server, "/v1/chat/completions", model="first", messages=ASKED, max_tokens=1
        ).headers
    )


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_where_no_call_is_read_a_demand_for_one_is_refused(server: Server, choice: Any) -> None:
    with server.client() as client, pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(
            model="base", messages=ASKED, tools=[TOOL], tool_choice=choice, max_tokens=4
        )
    assert refusal.value.param == "tool_choice" and "--tool-parser" in refusal.value.message


def test_where_no_call_is_read_the_other_apis_say_so(server: Server) -> None:
    with server.client() as client, pytest.raises(openai.BadRequestError, match="--tool-parser"):
        client.responses.create(model="base", input="What?", tools=[FLAT])
    tool = {"name": "weather", "input_schema": SCHEMA}
    body = {"model": "base", "max_tokens": 4, "messages": ASKED, "tools": [tool]}
    answer = post(server, "/v1/messages", **body)
    assert answer.status_code == 200 and "x-quantserve-warning" in answer.headers
    demanded = post(server, "/v1/messages", **body, tool_choice={"type": "any"})
    assert demanded.status_code == 400 and "--tool-parser" in demanded.json()["error"]["message"]


def test_a_field_that_would_be_dropped_is_refused(api: httpx.Client) -> None:
    body = {"model": "base", "prompt": "Rome or Paris?", "guided_choice": ["Rome", "Paris"]}
    fault = api.post("/v1/completions", json=body).json()["error"]
    assert fault["param"] == "guided_choice" and "structured_outputs" in fault["message"]


def test_an_unknown_model_is_told_which_there_are(api: httpx.Client) -> None:
    """In the same words, whatever it was asked of."""
    asked: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": ASKED},
        "/v1/completions": {"prompt": "x"},
        "/v1/responses": {"input": "x"},
        "/v1/messages": {"messages": ASKED, "max_tokens": 1},
        "/v1/messages/count_tokens": {"messages": ASKED},
        "/tokenize": {"prompt": "x"},
    }
    answers = [api.post(path, json={"model": "frist", **body}) for path, body in asked.items()]
    answers.append(api.get("/v1/models/frist"))
    assert {answer.status_code for answer in answers} == {404}
    (message,) = {answer.json()["error"]["message"] for answer in answers}
    assert message.startswith("the model 'frist' does not exist; expected one of first, ")
    assert "base" in message
