"""Where vLLM's way with requests and their tools is changed: a door of vLLM's, as vllm_compat is.

Requests are judged once their model is found; calls are held to the schemas of their tools by the
two functions of vLLM's that decide, for each tool, how its grammar is made.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from http import HTTPStatus
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionToolsParam
from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.tool_parsers import structural_tag_registry
from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar

from serve.errors import ModelNotFound, ServeError


def judge_requests(
    prepare: Callable[[Any], None],
    unknown: Callable[[Any], ModelNotFound],
    told: Callable[[ServeError], None],
) -> None:
    """Let `prepare` change or refuse every request whose model is there; `unknown` says what is.

    `told` hears of every refusal of ours: vLLM's Anthropic routes would make an error 500 of it.
    """
    for handler in (BaseServing, PoolingBaseServing):
        _judge(handler, _judged(handler.__dict__["_check_model"], prepare, unknown), told)


def _judged(stock: Any, prepare: Callable[[Any], None], unknown: Callable[[Any], Any]) -> Any:
    async def judged(self: Any, request: Any) -> None:
        await stock(self, request)  # notes whom the request is for, before its model is looked up
        name = request.model
        if not self._is_model_supported(name) and name not in self.models.lora_requests:
            raise unknown(name)
        prepare(request)

    return judged


def _judge(handler: Any, judged: Any, told: Callable[[ServeError], None]) -> None:
    async def check_model(self: Any, request: Any) -> Any:
        try:
            return await judged(self, request)
        except ServeError as fault:
            told(fault)
            if isinstance(self, PoolingBaseServing):  # whose callers do not look at what it returns
                raise
            return self.create_error_response(str(fault), fault.type, HTTPStatus(fault.status))

    handler._check_model = check_model


def reads_calls(renderer: Any) -> tuple[bool, bool]:
    """Whether vLLM finds calls in answers; and whether it can force the model to make one."""
    if renderer.use_harmony:
        return True, True
    parser = renderer.parser.tool_parser_cls if renderer.parser is not None else None
    if parser is None:
        return False, False
    return True, parser.supports_required_and_named or parser.structural_tag_model is not None


def hold_arguments(renderer: Any, warn: Callable[[str], None]) -> None:
    """Hold calls to the schemas of their tools, but where a client says `strict: false`.

    vLLM does where a client says `strict: true`. A schema that xgrammar cannot take is warned of
    instead, and its arguments are any object.
    """
    parser = renderer.parser.tool_parser_cls if renderer.parser is not None else None
    model = parser.structural_tag_model if parser is not None else None
    dump = vars(structural_tag_registry)["_dump_tool_for_xgrammar"]

    def is_strict(tool: Any) -> bool:
        function = getattr(tool, "function", tool)
        said = getattr(function, "strict", None)
        if said is not None or model is None:
            return said is True
        fault = _grammar_fault(model, json.dumps(function.parameters))
        if fault:
            warn(
                f"the arguments of {ascii(function.name)[:80]} are not held to its schema: {fault}"
            )
        return not fault

    def dumped(tool: Any) -> dict[str, Any]:
        told: dict[str, Any] = dump(tool)
        function = told["function"]
        if function.get("strict") is False or not function.get("parameters"):
            function |= {"strict": True, "parameters": {"type": "object"}}
        return told

    assert structural_tag_registry._tool_is_strict
    structural_tag_registry._tool_is_strict = is_strict
    structural_tag_registry._dump_tool_for_xgrammar = dumped


@lru_cache(maxsize=512)
def _grammar_fault(model: str, parameters: str) -> str:
    """Why a tool with this schema has no grammar; empty where it has one."""
    function = {"name": "f", "parameters": json.loads(parameters), "strict": True}
    tool = ChatCompletionToolsParam(function=function)
    try:
        tag = structural_tag_registry.get_model_structural_tag(model, [tool], "required", False)  # noqa: FBT003
        told = StructuredOutputsParams(structural_tag=json.dumps(tag.model_dump()))
        validate_xgrammar_grammar(SamplingParams(structured_outputs=told))
    except (AttributeError, LookupError, TypeError, ValueError, VLLMValidationError) as fault:
        return ascii(str(fault.__cause__ or fault).splitlines()[-1])[:200]
    return ""
