"""What becomes of tools, on the requests that vLLM itself has read."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest

from serve import tools
from serve.errors import BadRequest
from serve.parsers import Parsers, Pick
from serve.tools import DROPPED, IGNORED, UNFORCED, UNWRITTEN, Tools
from tests.test_parsers import CHAT, HERMES

MESSAGES = [{"role": "user", "content": "What is the weather in Paris?"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"name": "weather", "parameters": SCHEMA}
TOOL = {"type": "function", "function": FUNCTION}
FLAT = {"type": "function", **FUNCTION}
NAMED = {"type": "function", "function": {"name": "weather"}}
READS = Tools(reads=True, parser="hermes")
DEAF = Tools(reads=False, why="the chat template writes no tools")


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"messages": MESSAGES, "tools": [TOOL], **fields})


def responses(**fields: Any) -> ResponsesRequest:
    return ResponsesRequest.model_validate({"input": "What?", "tools": [FLAT], **fields})


def prepared(able: Tools, request: Any) -> list[str]:
    """What the client is warned of."""
    warned: list[str] = []
    able.prepare(request, warned.append)
    return warned


def refusal(able: Tools, request: Any) -> BadRequest:
    with pytest.raises(BadRequest) as refused:
        able.prepare(request, print)
    assert "\n" not in str(refused.value) and "expected" in str(refused.value)
    return refused.value


@pytest.mark.parametrize("said", [{}, {"tool_choice": "auto"}, {"tool_choice": None}])
def test_offered_tools_that_nobody_would_read_are_left_out_and_said(said: Any) -> None:
    request = chat(**said)
    assert prepared(DEAF, request) == [f"{IGNORED} (the chat template writes no tools)"]
    assert request.tools is None and request.tool_choice == "none"
    assert [text.encode("ascii") for text in prepared(DEAF, chat())], "it goes into a header"


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_demanded_call_that_nobody_would_read_is_refused(choice: Any) -> None:
    fault = refusal(DEAF, chat(tool_choice=choice))
    assert fault.param == "tool_choice" and "--tool-parser NAME" in str(fault)


def test_responses_give_calls_or_refuse() -> None:
    """Nothing in this API's answers would tell a client that its tools are ignored."""
    for choice in ("auto", "required", {"type": "function", "name": "weather"}):
        assert refusal(DEAF, responses(tool_choice=choice)).param == "tools"
    assert prepared(DEAF, responses(tool_choice="none")) == []
    assert prepared(DEAF, responses(tools=[])) == []
    assert prepared(READS, responses(tool_choice="required")) == []


@pytest.mark.parametrize("kind", ["web_search", "web_search_preview", "local_shell"])
def test_tools_that_openai_runs_are_refused_by_name(kind: str) -> None:
    fault = refusal(READS, responses(tools=[FLAT, {"type": kind}]))
    assert kind in str(fault) and fault.param == "tools[1].type"
    runs = Tools(reads=True, runs=True)
    assert prepared(runs, responses(tools=[FLAT, {"type": kind}])) == []


def test_a_choice_of_openais_own_tools_is_refused() -> None:
    choice = {"type": "web_search_preview"}
    assert refusal(READS, responses(tool_choice=choice)).param == "tool_choice.type"


def test_of_allowed_tools_only_those_are_offered() -> None:
    other = {"type": "function", "name": "other", "parameters": SCHEMA}
    choice = {"type": "allowed_tools", "mode": "required",
              "tools": [{"type": "function", "name": "weather"}]}  # fmt: skip
    request = responses(tools=[other, FLAT], tool_choice=choice)
    assert prepared(READS, request) == []
    assert [tool.name for tool in request.tools] == ["weather"]
    assert request.tool_choice == "required"
    nobody = {**choice, "tools": [{"type": "function", "name": "nobody"}]}
    assert refusal(READS, responses(tool_choice=nobody)).param == "tool_choice.tools"


def test_anthropics_tools_come_by_the_same_door() -> None:
    tool = {"name": "weather", "input_schema": SCHEMA}

    def message(**fields: Any) -> ChatCompletionRequest:
        asked = {"model": "m", "max_tokens": 8, "messages": MESSAGES, "tools": [tool], **fields}
        read = AnthropicMessagesRequest.model_validate(asked)
        return AnthropicServingMessages.to_chat_completion_request(read)

    request = message()
    assert prepared(DEAF, request) and request.tools is None
    assert refusal(DEAF, message(tool_choice={"type": "any"})).param == "tool_choice"
    assert prepared(READS, message(tool_choice={"type": "tool", "name": "weather"})) == []


def test_where_calls_are_read_nothing_is_changed() -> None:
    for choice in ("auto", "required", NAMED, "none"):
        request = chat(tool_choice=choice)
        before = request.model_dump()
        assert prepared(READS, request) == [] and request.model_dump() == before


def test_a_choice_of_null_is_openais_default() -> None:
    request = chat(tool_choice=None)
    assert prepared(READS, request) == [] and request.tool_choice == "auto"


def test_tools_that_the_model_does_not_see_are_said() -> None:
    silent = Tools(reads=True, written=False)
    assert prepared(silent, chat()) == [UNWRITTEN]
    assert prepared(silent, chat(tool_choice="none")) == []


def test_a_call_that_cannot_be_forced_is_said() -> None:
    free = Tools(reads=True, forces=False)
    assert prepared(free, chat(tool_choice="required")) == [UNFORCED]
    assert prepared(free, chat()) == []


def test_counting_sees_what_a_chat_would() -> None:
    for able, left in ((DEAF, 0), (READS, 1)):
        request = TokenizeChatRequest.model_validate({"messages": MESSAGES, "tools": [TOOL]})
        assert prepared(able, request) == [] and len(request.tools or []) == left


def test_a_version_with_another_form_than_the_base_says_so() -> None:
    own = READS.beside(HERMES.replace("<tool_call>", "[TOOL_CALLS]"), "llama")
    assert "form of mistral" in prepared(own, chat())[0]
    assert "form of hermes" in prepared(DEAF.beside(HERMES, "llama"), chat())[0]
    assert prepared(READS.beside(CHAT, "llama"), chat()) == [UNWRITTEN]
    assert READS.beside(HERMES, "llama") == READS.beside(None, "llama") == READS


@pytest.mark.parametrize("kind", ["string", "array", ["object", "null"]])
def test_arguments_of_a_tool_are_an_object(kind: Any) -> None:
    bad = {"type": "function", "function": {"name": "f", "parameters": {"type": kind}}}
    assert refusal(READS, chat(tools=[TOOL, bad])).param == "tools[1].function.parameters.type"
    flat = {"type": "function", "name": "f", "parameters": {"type": kind}}
    assert refusal(READS, responses(tools=[flat])).param == "tools[0].parameters.type"


@pytest.mark.parametrize("schema", [{}, None, {"properties": {}}, {"anyOf": [SCHEMA]}])
def test_a_schema_may_leave_its_type_out(schema: Any) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    assert prepared(READS, chat(tools=[tool])) == []


@pytest.mark.parametrize("name", sorted(DROPPED))
def test_what_would_be_dropped_without_a_word_is_refused_by_name(name: str) -> None:
    fields = {name: {"any": "thing"}}
    for request in (
        chat(tools=None, tool_choice="none", **fields),
        CompletionRequest.model_validate({"prompt": "x", **fields}),
        responses(tools=[], **fields),
    ):
        fault = refusal(READS, request)
        assert fault.param == name and DROPPED[name] in str(fault)


def test_fields_that_bound_nothing_are_ignored_as_before() -> None:
    harmless = {"store": True, "metadata": {"a": "b"}, "function_call": "auto", "functions": [],
                "guided_json": None, "verbosity": "low"}  # fmt: skip
    assert prepared(READS, chat(**harmless)) == []


def test_the_reason_fits_a_header() -> None:
    parsers = Parsers(Pick(None, "lacks <｜tool▁sep｜>"), written=False)
    able = tools.of(parsers, reads=False, forces=False, runs=False)
    assert able.why.isascii() and not able.written
