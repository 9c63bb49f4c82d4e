"""What becomes of a request's tools, and of fields that vLLM would drop without a word.

Held to what the server can read (serve.parsers), before vLLM renders the request: tools that nobody
would find in the answer are left out, and said so in a header; what demands a call is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from serve.errors import BadRequest
from serve.parsers import Parsers, form_of

IGNORED = "tools are ignored: the server reads no tool calls of this model"
UNWRITTEN = "the model does not see the tools: its chat template writes none"
UNFORCED = "tool_choice does not force a call: vLLM has no grammar for this model's calls"
OFFERED = ("function", "custom", "namespace")  # types of /v1/responses that clients run
_STRUCTURED = "structured_outputs"
# Fields that bound an answer once or elsewhere, and that vLLM takes and drops: what says it now.
DROPPED = {
    "guided_json": f'{_STRUCTURED}: {{"json": ...}}',
    "guided_regex": f'{_STRUCTURED}: {{"regex": ...}}',
    "guided_choice": f'{_STRUCTURED}: {{"choice": ...}}',
    "guided_grammar": f'{_STRUCTURED}: {{"grammar": ...}}',
    "guided_whitespace_pattern": f'{_STRUCTURED}: {{"whitespace_pattern": ...}}',
    "guided_decoding_backend": "the flag --structured-outputs-config of the server",
    "grammar": f'{_STRUCTURED}: {{"grammar": ...}}',
    "ebnf": f'{_STRUCTURED}: {{"grammar": ...}}',
    "regex": f'{_STRUCTURED}: {{"regex": ...}}',
    "json_schema": "response_format, or text.format in /v1/responses",
    "functions": "tools",
    "function_call": "tool_choice",
}


@dataclass(frozen=True, slots=True)
class Tools:
    """What the server can do with them.

    `reads`: a parser finds calls in answers; `forces`: a call can be demanded; `written`: the
    base's template tells the model of tools; `runs`: vLLM was given a server of tools of its own.
    """

    reads: bool
    forces: bool = True
    written: bool = True
    runs: bool = False
    why: str = ""
    parser: str | None = None  # the one that reads
    other: str = ""  # what is wrong with it for a version's own template

    def beside(self, template: str | None, model_type: str) -> Tools:
        """The same for a version that brings a template of its own; None: it brings none."""
        if template is None:
            return self
        form = form_of(template, model_type)
        why, other = self.why, ""
        if form not in (None, self.parser):
            why = f"the adapter's chat template has the form of {form}"
            other = f"{why}, and the server reads that of {self.parser}"
        return replace(self, written="tools" in template, why=why, other=other)

    def prepare(self, request: Any, warn: Callable[[str], None]) -> None:
        """Change a request of vLLM's so that its answer is what it asked for. BadRequest else."""
        refuse_dropped(getattr(request, "model_extra", None) or {})  # not all are of pydantic's
        asked = vars(request)
        if not asked.get("tools"):
            return
        _refuse_shapes(asked["tools"])
        if "tool_choice" not in asked:  # /tokenize counts what chat would be told
            request.tools = asked["tools"] if self.reads else None
        elif "input" in asked:
            self._of_responses(request, warn)
        else:
            self._of_chat(request, warn)

    def _of_chat(self, request: Any, warn: Callable[[str], None]) -> None:
        if request.tool_choice is None:  # said to be none; OpenAI's default, where there are tools
            request.tool_choice = "auto"
        if self.reads:
            self._note(request.tool_choice, warn)
        elif request.tool_choice == "auto":
            request.tools, request.tool_choice = None, "none"
            warn(f"{IGNORED} ({self.why})")
        elif request.tool_choice != "none":
            raise self._unread("tool_choice", 'tool_choice "auto" or "none"')

    def _of_responses(self, request: Any, warn: Callable[[str], None]) -> None:
        _take_allowed(request)
        if request.tool_choice == "none":
            return
        if not self.reads:
            raise self._unread("tools", 'no tools, or tool_choice "none"')
        if not self.runs:
            _refuse_hosted(request)
        self._note(request.tool_choice, warn)

    def _note(self, choice: Any, warn: Callable[[str], None]) -> None:
        if choice != "none":
            for fault in filter(None, (self.other, "" if self.written else UNWRITTEN)):
                warn(fault)
        if not self.forces and choice not in ("auto", "none"):
            warn(UNFORCED)

    def _unread(self, param: str, expected: str) -> BadRequest:
        return BadRequest(
            f"the server reads no tool calls of this model ({self.why}); expected {expected}. "
            "Start the server with --tool-parser NAME, serve a model whose chat template writes "
            f"tools, or ask for JSON by {_STRUCTURED}",
            param=param,
        )


def of(parsers: Parsers, *, reads: bool, forces: bool, runs: bool) -> Tools:
    """The first two are of the parser that vLLM has really made."""
    why = parsers.tools.why.encode("ascii", "replace").decode()
    return Tools(reads, forces, parsers.written, runs, why, parsers.tools.name)


def refuse_dropped(extra: Mapping[str, Any]) -> None:
    """BadRequest for a field that would bound the answer, and that vLLM would drop."""
    for name in extra.keys() & DROPPED.keys():
        if extra[name] and extra[name] not in ("none", "auto"):
            raise BadRequest(
                f"{name} is no field of this API and would be ignored; expected {DROPPED[name]}",
                param=name,
            )


def _refuse_shapes(tools: list[Any]) -> None:
    """Arguments are an object: a schema of anything else has no call that a client could read."""
    for place, tool in enumerate(tools):
        function = getattr(tool, "function", tool)
        schema = getattr(function, "parameters", None) or {}
        if schema.get("type", "object") not in ("object", ["object"]):
            where = "function.parameters" if function is not tool else "parameters"
            raise BadRequest(
                f'the parameters of a tool are of type {schema["type"]!r}; expected "object"',
                param=f"tools[{place}].{where}.type",
            )


def _refuse_hosted(request: Any) -> None:
    """Tools that OpenAI runs itself, which vLLM would leave out without a word."""
    for place, tool in enumerate(request.tools):
        if tool.type not in OFFERED:
            raise BadRequest(
                f"tools of type {tool.type!r} are not run by this server; expected one of "
                f"{', '.join(OFFERED)}: your client runs it",
                param=f"tools[{place}].type",
            )
    choice = getattr(request.tool_choice, "type", "function")
    if choice not in OFFERED:
        raise BadRequest(
            f"tool_choice of type {choice!r} is not known to this server; expected none, auto, "
            "required, function, custom or allowed_tools",
            param="tool_choice.type",
        )


def _take_allowed(request: Any) -> None:
    """Of all tools those that the choice allows: vLLM would let the model call any of them."""
    choice = request.tool_choice
    if getattr(choice, "type", "") == "allowed_tools":
        allowed = {(tool.get("type"), tool.get("name")) for tool in choice.tools}
        request.tools = [t for t in request.tools if (t.type, getattr(t, "name", None)) in allowed]
        request.tool_choice = choice.mode
        if not request.tools:
            raise BadRequest(
                "tool_choice allows none of the tools; expected names of tools",
                param="tool_choice.tools",
            )
