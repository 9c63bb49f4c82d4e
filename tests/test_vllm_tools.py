"""Our hand on vLLM's way with requests and tools, on vLLM's own classes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.parser.parser_manager import ParserManager
from vllm.tool_parsers import structural_tag_registry

from serve import vllm_tools
from serve.errors import BadRequest, ModelNotFound, ServeError
from tests.test_forms import Tokenizer
from tests.test_tools import FLAT, MESSAGES, SCHEMA

GOOD = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
BAD = {"type": "object", "properties": {"city": {"type": "wizard"}}}


def tool(name: str = "weather", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": GOOD, **fields}}


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """vLLM with our two functions, as a server with the parser for hermes has it."""
    for name in ("_tool_is_strict", "_dump_tool_for_xgrammar"):
        monkeypatch.setattr(structural_tag_registry, name, vars(structural_tag_registry)[name])
    told: list[str] = []
    vllm_tools.hold_arguments(renderer(), told.append)
    yield told


def renderer(name: str | None = "hermes") -> Any:
    parser = ParserManager.get_parser(tool_parser_name=name, enable_auto_tools=True)
    return SimpleNamespace(parser=parser, use_harmony=False)


def grammar(tools: list[dict[str, Any]], choice: Any = "auto", **fields: Any) -> str:
    """The structural tag that vLLM's own parser makes for a chat; empty: it makes none."""
    asked = {"messages": MESSAGES, "tools": tools, "tool_choice": choice, **fields}
    return tag_of(ChatCompletionRequest.model_validate(asked))


def tag_of(request: Any) -> str:
    adjusted = renderer().parser(Tokenizer(), request.tools).adjust_request(request)
    told = adjusted.structured_outputs
    return "" if told is None else str(told.structural_tag)


def schemas(tag: str) -> list[Any]:
    """Every schema in a structural tag."""
    found: list[Any] = []

    def visit(node: Any) -> None:
        for name, value in node.items() if isinstance(node, dict) else ():
            if name == "json_schema":
                found.append(value)
            visit(value)
        for value in node if isinstance(node, list) else ():
            visit(value)

    visit(json.loads(tag))
    return found


NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize("choice", ["auto", "required", NAMED])
def test_arguments_are_held_to_their_schema_by_default(warned: list[str], choice: Any) -> None:
    found = schemas(grammar([tool()], choice))
    assert found and all(schema == GOOD for schema in found) and not warned


def test_the_prompt_does_not_show_it(warned: list[str]) -> None:
    """A template writes a tool as it came: `strict` would be one more thing to read."""
    asked = {"messages": MESSAGES, "tools": [tool()]}
    request = ChatCompletionRequest.model_validate(asked)
    assert tag_of(request) and request.tools is not None
    assert "strict" not in request.tools[0].model_dump()["function"]


def test_a_client_may_say_otherwise(warned: list[str]) -> None:
    """Then arguments are any object, and not a string that happens to be JSON."""
    assert grammar([tool(strict=False)]) == ""
    assert set(map(str, schemas(grammar([tool(strict=False)], "required")))) == {
        "{'type': 'object'}"
    }


@pytest.mark.parametrize("schema", [None, {}])
def test_a_tool_without_a_schema_takes_an_object(warned: list[str], schema: Any) -> None:
    found = schemas(grammar([tool(parameters=schema)], "required"))
    assert found and all(given == {"type": "object"} for given in found)


def test_a_schema_that_has_no_grammar_is_warned_of_and_costs_the_others_nothing(
    warned: list[str],
) -> None:
    found = schemas(grammar([tool("bad\nname", parameters=BAD), tool()], "required"))
    assert GOOD in found and {"type": "object"} in found and BAD not in found
    assert warned and all("'bad\\nname'" in text and "wizard" in text for text in warned)
    assert all(text.isascii() and text.isprintable() for text in warned)


def test_where_the_client_demands_it_vllm_refuses_such_a_schema(warned: list[str]) -> None:
    assert BAD in schemas(grammar([tool(parameters=BAD, strict=True)], "required")) and not warned


def test_responses_hold_arguments_too(warned: list[str]) -> None:
    namespace = {"type": "namespace", "name": "home", "description": "d",
                 "tools": [{"type": "function", "name": "lamp", "parameters": GOOD}]}  # fmt: skip
    for tools in ([FLAT], [namespace]):
        asked = {"input": "What?", "tools": tools, "tool_choice": "required"}
        found = schemas(tag_of(ResponsesRequest.model_validate(asked)))
        assert found and all(schema in (GOOD, SCHEMA) for schema in found)


def test_what_vllm_reads_and_forces() -> None:
    assert vllm_tools.reads_calls(renderer("hermes")) == (True, True)
    assert vllm_tools.reads_calls(renderer("gemma4")) == (True, False)
    assert vllm_tools.reads_calls(renderer(None)) == (False, False)
    assert vllm_tools.reads_calls(SimpleNamespace(use_harmony=True)) == (True, True)


class Chats(BaseServing):  # type: ignore[misc]
    """A handler of vLLM's that knows one model."""

    def __init__(self) -> None:
        names = SimpleNamespace(name="base")
        self.request_logger = None
        self.models = SimpleNamespace(
            lora_requests={}, base_model_paths=[names], is_base_model="base".__eq__
        )


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ServeError]]:
    for handler in (BaseServing, PoolingBaseServing):
        monkeypatch.setattr(handler, "_check_model", vars(handler)["_check_model"])
    told: list[ServeError] = []

    def prepare(request: Any) -> None:
        if request.refuse:
            raise BadRequest("no", param="tools")

    def unknown(name: Any) -> ModelNotFound:
        return ModelNotFound(f"no {name}")

    vllm_tools.judge_requests(prepare, unknown, told.append)
    yield told


async def check(model: str, *, refuse: bool = False) -> ErrorResponse | None:
    found: ErrorResponse | None = await Chats()._check_model(
        SimpleNamespace(model=model, refuse=refuse)
    )
    return found


async def test_a_refusal_is_an_answer_and_told(judged: list[ServeError]) -> None:
    """Anthropic's routes would make an internal error of an exception."""
    assert await check("base") is None and not judged
    refused = await check("base", refuse=True)
    assert refused is not None and refused.error.code == HTTPStatus.BAD_REQUEST
    assert [str(fault) for fault in judged] == ["no"]


async def test_a_missing_model_is_ours_to_name(judged: list[ServeError]) -> None:
    refused = await check("nope", refuse=True)
    assert refused is not None and refused.error.message == "no nope"
    assert [type(fault) for fault in judged] == [ModelNotFound]


async def test_pooling_says_the_same(judged: list[ServeError]) -> None:
    class Pooling(PoolingBaseServing):  # type: ignore[misc]
        __init__ = Chats.__init__
        _build_response = PoolingBaseServing._build_response

    Pooling.__abstractmethods__ = frozenset()
    with pytest.raises(ModelNotFound, match="no nope"):
        await Pooling()._check_model(SimpleNamespace(model="nope", refuse=False))
