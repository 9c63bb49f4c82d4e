"""A conversation as vLLM hands it to a model's chat template.

Before the template sees a request's messages, vLLM rewrites them: content becomes one string or a
list of parts, whichever the template reads, arguments of tool calls become objects, thoughts get
both of their names, and what it does not know is dropped. This is the same for messages of a file.
Refuses what vLLM would refuse; follows vLLM 0.32, and tests hold it to that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pydantic_core

from quant.content_format import ContentFormat

Message = Mapping[str, Any]

# Parts of text, and under which key each has it.
_TEXTS = {
    "text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal",
    "thinking": "thinking",
}  # fmt: skip
_SEEN_OR_HEARD = ("image", "audio", "video", "prompt_embeds")
_FUNCTION = "function"
_BILLING = "x-anthropic-billing-header"  # a line that coding agents send, and vLLM drops
_RESERVED = frozenset({
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "messages",
    "tokenize", "tools",
})  # fmt: skip


class Malformed(ValueError):
    """Messages or tools that vLLM would refuse; says where."""


@dataclass(frozen=True, slots=True)
class Chat:
    """`messages` and `tools` as a request has them, and what else its template may read.

    Malformed says what vLLM would refuse it for.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)  # `chat_template_kwargs`

    def __post_init__(self) -> None:
        for place, message in enumerate(self.messages):
            if not isinstance(message.get("role"), str):
                raise Malformed(f"messages: {place}: a role is expected")
            _texts(message.get("content"), f"messages: {place}: content")
            _calls(message, f"messages: {place}: tool_calls")
        for place, tool in enumerate(self.tools or ()):
            if not isinstance(_function(tool).get("name"), str):
                raise Malformed(f"tools: {place}: a function with a name is expected")
        if taken := sorted(_RESERVED & self.variables.keys()):
            raise Malformed(f"chat_template_kwargs: {taken[0]} is not the template's to be told")


def has_media(messages: Sequence[Message]) -> bool:
    """Whether a part of a message is seen or heard, which calibration cannot give to a model."""
    contents = (message.get("content") for message in messages)
    parts = (part for content in contents if isinstance(content, list) for part in content)
    return any(_is_media(part) for part in parts)


def shown(messages: Sequence[Message], form: ContentFormat, template: str) -> list[dict[str, Any]]:
    """The messages as a template that reads contents of this form is given them."""
    told = [_message(message, form) for message in messages]
    speaks = any(message["role"] == "developer" for message in told)
    if speaks and "'developer'" not in template and '"developer"' not in template:
        return _one_system([_as_system(message) for message in told])
    return told


def functions(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """The tools as a template is given them: each field that vLLM knows, in its order.

    None of an empty list, which vLLM refuses: data sets have one where there are no tools.
    """
    return [_tool(tool) for tool in tools] if tools else None


def _message(message: Message, form: ContentFormat) -> dict[str, Any]:
    role = message["role"]
    texts = _texts(message.get("content"), "content")
    if role == "system":
        texts = [kept for text in texts if (kept := _without_billing(text)) is not None]
    told: dict[str, Any] = {"role": role, "content": _content(role, texts, form)}
    if role == "assistant":
        if calls := _calls(message, "tool_calls"):
            told["tool_calls"] = calls
        thought = message.get("reasoning")
        thought = message.get("reasoning_content") if thought is None else thought
        if thought is not None:
            told["reasoning"] = told["reasoning_content"] = thought
    elif role == "tool" and "tool_call_id" in message:
        told["tool_call_id"] = message["tool_call_id"]
    told |= {key: message[key] for key in ("name", "task") if isinstance(message.get(key), str)}
    if role == "developer":
        told["tools"] = message.get("tools")
    return told


def _content(
    role: str, texts: Sequence[str | Mapping[str, str]], form: ContentFormat
) -> str | list[dict[str, str]]:
    """References to tools stay parts where parts are read."""
    plain = [text if isinstance(text, str) else text["name"] for text in texts]
    whole = all(isinstance(text, str) for text in texts)
    if form == "string" or (role == "tool" and whole):
        return "\n".join(plain)
    return [{"type": "text", "text": t} if isinstance(t, str) else dict(t) for t in texts]


def _texts(content: object, where: str) -> list[str | Mapping[str, str]]:
    """What a message says, part by part; a reference to a tool is a part of its own."""
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise Malformed(f"{where}: a text or a list of parts is expected")
    parts = enumerate(content)
    found = [_text(part, f"{where}: {place}") for place, part in parts if not _is_media(part)]
    return [text for text in found if text is not None]


def _text(part: object, where: str) -> str | Mapping[str, str] | None:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise Malformed(f"{where}: a part with a type is expected")
    if kind == "tool_reference" and isinstance(part.get("name"), str):
        return {"type": kind, "name": part["name"]}
    if kind not in _TEXTS:
        raise Malformed(f"{where}: a part of type {kind[:40]!r} is none that vLLM takes")
    text = part.get(_TEXTS[kind])
    if text is not None and not isinstance(text, str):
        raise Malformed(f"{where}: {_TEXTS[kind]} is no text")
    return text


def _is_media(part: object) -> bool:
    if not isinstance(part, dict):
        return False
    kind = part.get("type")
    told = [kind.removeprefix("input_")] if isinstance(kind, str) else list(part)
    return any(str(name).startswith(_SEEN_OR_HEARD) for name in told)


def _without_billing(text: str | Mapping[str, str]) -> str | Mapping[str, str] | None:
    """None where nothing is left."""
    if not isinstance(text, str) or not text.startswith(_BILLING):
        return text
    return text.partition("\n")[2] or None


def _calls(message: Message, where: str) -> list[dict[str, Any]]:
    """An assistant's calls with arguments as objects: templates read them, clients send JSON."""
    calls = message.get("tool_calls")
    if calls is None or message["role"] != "assistant":
        return []
    if not isinstance(calls, list):
        raise Malformed(f"{where}: a list is expected")
    told = []
    for place, call in enumerate(calls):
        function = _function(call) if isinstance(call, dict) else {}
        if not isinstance(function.get("name"), str) or call.get("type", _FUNCTION) != _FUNCTION:
            raise Malformed(f"{where}: {place}: a call of a function with a name is expected")
        function = {"arguments": _arguments(function.get("arguments")), "name": function["name"]}
        kept = {"id": call.get("id"), "function": function, "type": _FUNCTION}
        told.append({key: value for key, value in kept.items() if value is not None})
    return told


def _arguments(given: object) -> dict[str, Any]:
    """Of what is no object, vLLM makes an empty one."""
    if isinstance(given, str):
        try:
            given = pydantic_core.from_json(given)
        except ValueError:
            return {}
    return given if isinstance(given, dict) else {}


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a tool or a call, or a bare function, as some data sets list them."""
    function = tool.get("function", tool)
    return function if isinstance(function, Mapping) else {}


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = _function(tool)
    told = {key: function.get(key) for key in ("name", "description", "parameters")}
    late = tool.get("defer_loading") if "function" in tool else None
    own = function.get("defer_loading")
    rest = {"strict": function.get("strict"), "defer_loading": late if own is None else own}
    told |= {key: value for key, value in rest.items() if value is not None}
    whole = {"type": _FUNCTION, "function": told}
    return whole if late is None else {**whole, "defer_loading": late}


def _as_system(message: dict[str, Any]) -> dict[str, Any]:
    """A developer's message for a template that knows no developers."""
    if message["role"] != "developer":
        return message
    return {key: value for key, value in message.items() if key != "tools"} | {"role": "system"}


def _one_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One system message, at the beginning: many templates take no other."""
    places = [place for place, message in enumerate(messages) if message["role"] == "system"]
    if places in ([], [0]):
        return messages
    said = [_joined(messages[place]["content"]) for place in places]
    others = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(filter(None, said))}, *others]


def _joined(content: str | list[dict[str, str]]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if "text" in part)
