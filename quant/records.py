"""What a record of a calibration file holds: a text or a chat, under the keys of whichever tool.

Our own `text` and `messages`, ShareGPT's `conversations`, TRL's `prompt` and `completion`, Alpaca's
`instruction` and `output`. Keys beyond those of a format are the file owner's business. Refuses a
record in none of them by the keys that are there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import pydantic_core
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from quant import conversation, jsonl
from quant.conversation import Chat, Malformed, Message

EXPECTED = (
    '"text", "messages", "conversations" (ShareGPT), "prompt" and "completion", or "instruction"'
    ' and "output" (Alpaca)'
)
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "system": "system",
    "tool": "tool", "observation": "tool", "function_response": "tool", "tool_response": "tool",
    "function_call": "assistant",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Text:
    """A text, of which `prompt` characters were given, and the rest was the answer."""

    text: str
    prompt: int = 0


Document = Text | Chat


class Record(BaseModel):
    """One record, recognized by its keys."""

    model_config = ConfigDict(extra="allow")
    _document: Document = PrivateAttr()

    @property
    def document(self) -> Document:
        return self._document

    @property
    def has_media(self) -> bool:
        """Whether it is a chat about something seen or heard, in its messages or beside them."""
        beside = any((self.model_extra or {}).get(key) for key in _MEDIA)
        chat = self.document
        return isinstance(chat, Chat) and (beside or conversation.has_media(chat.messages))

    @model_validator(mode="after")
    def _is_recognized(self) -> Self:
        fields = {key: v for key, v in (self.model_extra or {}).items() if v is not None}
        if {"text", "messages"} <= fields.keys():
            raise ValueError('a line has either "text" or "messages", not both')
        found = next((each for each in _FORMATS if each.needs <= fields.keys()), None)
        if found is None:
            there = ", ".join(f'"{key[:40]}"' for key in list(fields)[:8]) or "none"
            raise ValueError(f"its keys are {there}; expected {EXPECTED}")
        try:
            self._document = found.model_validate(fields).document()
        except ValidationError as fault:
            raise ValueError(jsonl.reason(fault)) from fault
        return self


def _listed(tools: object) -> object:
    """Tools, that some files keep as a string of JSON."""
    if not isinstance(tools, str):
        return tools
    try:
        return pydantic_core.from_json(tools) if tools.strip() else None
    except ValueError as fault:
        raise ValueError("the text is no JSON") from fault


_Messages = Annotated[list[dict[str, Any]], Field(min_length=1)]


class _Format(BaseModel):
    """It `needs` these keys."""

    needs: ClassVar[frozenset[str]]

    def document(self) -> Document:
        raise NotImplementedError


class _Chats(_Format):
    """A chat may have tools, documents, and variables of its template."""

    tools: Annotated[list[dict[str, Any]] | None, BeforeValidator(_listed)] = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] = {}

    def _chat(self, messages: Sequence[Message]) -> Chat:
        return Chat(messages, self.tools, self.documents, self.chat_template_kwargs)


class _Text(_Format):
    needs: ClassVar[frozenset[str]] = frozenset({"text"})
    text: str

    def document(self) -> Document:
        return Text(self.text)


class _Ours(_Chats):
    needs: ClassVar[frozenset[str]] = frozenset({"messages"})
    messages: _Messages

    def document(self) -> Document:
        return self._chat(self.messages)


class _ShareGpt(_Chats):
    needs: ClassVar[frozenset[str]] = frozenset({"conversations"})
    conversations: _Messages
    system: str = ""

    def document(self) -> Document:
        turns = [_turn(turn, place) for place, turn in enumerate(self.conversations)]
        return self._chat([*_said(system=self.system), *turns])


class _Completion(_Chats):
    needs: ClassVar[frozenset[str]] = frozenset({"prompt", "completion"})
    prompt: str | _Messages
    completion: str | _Messages

    def document(self) -> Document:
        if isinstance(self.prompt, str) and isinstance(self.completion, str):
            return Text(self.prompt + self.completion, len(self.prompt))
        if isinstance(self.prompt, str) or isinstance(self.completion, str):
            raise Malformed("prompt and completion: two texts or two lists of messages expected")
        return self._chat([*self.prompt, *self.completion])


class _Alpaca(_Chats):
    needs: ClassVar[frozenset[str]] = frozenset({"instruction", "output"})
    instruction: str
    input: str = ""
    output: str
    system: str = ""
    history: list[tuple[str, str]] = []

    def document(self) -> Document:
        asked = "\n".join(filter(None, (self.instruction, self.input)))
        turns = [turn for q, a in self.history for turn in _said(user=q, assistant=a)]
        return self._chat(
            [*_said(system=self.system), *turns, *_said(user=asked, assistant=self.output)]
        )


_FORMATS: tuple[type[_Format], ...] = (_Text, _Ours, _ShareGpt, _Completion, _Alpaca)


def _said(**contents: str) -> list[dict[str, Any]]:
    """A message for every role that said something."""
    return [{"role": role, "content": content} for role, content in contents.items() if content]


def _turn(turn: Mapping[str, Any], place: int) -> Message:
    """ShareGPT's `from` and `value`, or a message as it is."""
    if "from" not in turn:
        return turn
    role, value = turn["from"], turn.get("value")
    if not isinstance(role, str) or role not in _ROLES or not isinstance(value, str):
        expected = f"one of {', '.join(_ROLES)} with a text as value"
        raise Malformed(f"conversations: {place}: from is {str(role)[:40]!r}; expected {expected}")
    if role == "function_call" and (call := _call(value)) is not None:
        return {"role": "assistant", "content": None, "tool_calls": [call]}
    return {"role": _ROLES[role], "content": value}


def _call(value: str) -> dict[str, Any] | None:
    """None where the text is no JSON of a call: then it is what the model said."""
    try:
        function = pydantic_core.from_json(value)
    except ValueError:
        return None
    named = isinstance(function, dict) and isinstance(function.get("name"), str)
    return {"type": "function", "function": function} if named else None
