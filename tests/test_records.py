"""`quant.records`: the same chat under every tool's keys; others are named by theirs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from quant import jsonl
from quant.conversation import Chat
from quant.records import Document, Record, Text
from tests.chats import TOOLS, call, said


def document(record: Any) -> Document:
    return Record.model_validate_json(json.dumps(record)).document


CHAT = [said("system", "be brief"), said("user", "hi\nyou"), said("assistant", "a fox")]
FORMS: dict[str, dict[str, Any]] = {
    "messages": {"messages": CHAT, "prompt": "ours", "text": None},
    "ShareGPT": {"system": "be brief", "conversations": [
        {"from": "human", "value": "hi\nyou"}, {"from": "gpt", "value": "a fox"}]},
    "ShareGPT, its system inside": {"conversations": [
        {"from": "system", "value": "be brief"}, {"from": "human", "value": "hi\nyou"},
        {"from": "gpt", "value": "a fox"}]},
    "ShareGPT of messages": {"conversations": CHAT},
    "prompt and completion": {"prompt": CHAT[:2], "completion": CHAT[2:]},
    "Alpaca": {"instruction": "hi", "input": "you", "output": "a fox", "system": "be brief"},
    "Alpaca without an input": {"instruction": "hi\nyou", "input": "", "output": "a fox",
                                "system": "be brief", "history": None},
}  # fmt: skip


@pytest.mark.parametrize("record", FORMS.values(), ids=FORMS.keys())
def test_a_chat_is_the_same_under_every_tools_keys(record: dict[str, Any]) -> None:
    found = document(record)
    assert isinstance(found, Chat) and list(found.messages) == CHAT


def test_texts_are_texts_and_know_what_was_asked() -> None:
    assert document({"text": "a fox", "instruction": "x", "output": "y"}) == Text("a fox")
    assert document({"prompt": "a ", "completion": "fox"}) == Text("a fox", prompt=2)


def test_what_belongs_to_a_chat_comes_along() -> None:
    more = {"tools": TOOLS, "documents": [{"title": "x"}], "chat_template_kwargs": {"a": 1}}
    found = document({"messages": CHAT, **more})
    assert found == Chat(CHAT, TOOLS, [{"title": "x"}], {"a": 1})


def test_sharegpts_calls_are_calls_and_its_history_turns() -> None:
    made = {"name": "weather", "arguments": {"city": "Paris"}}
    told = {"human": "?", "function_call": json.dumps(made), "observation": "sun", "gpt": "sunny"}
    turns = [{"from": role, "value": value} for role, value in told.items()]
    found = document({"conversations": turns, "tools": json.dumps(TOOLS)})
    assert isinstance(found, Chat) and found.tools == TOOLS
    assert [message["role"] for message in found.messages] == ["user", "assistant", "tool",
                                                               "assistant"]  # fmt: skip
    assert found.messages[1]["tool_calls"] == [{"type": "function", "function": made}]
    past = {"instruction": "2", "output": "b", "history": [["1", "a"]]}
    (older,) = (document(past),)
    assert isinstance(older, Chat)
    assert [message["content"] for message in older.messages] == ["1", "a", "2", "b"]


@pytest.mark.parametrize("key", ["image", "images", "videos", "audio"])
def test_a_chat_beside_an_image_is_about_it(key: str) -> None:
    for beside, expected in ((["a.png"], True), ("a.png", True), ([], False), (None, False)):
        record = Record.model_validate({"messages": CHAT, key: beside})
        assert record.has_media is expected
    assert not Record.model_validate({"text": "a fox", key: "a.png"}).has_media


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (
            {"question": "?", "answer": "!"},
            'its keys are "question", "answer"; expected "text", "m',
        ),
        ({"prompt": "hi"}, 'its keys are "prompt"; expected "text", "messages", "conversations"'),
        ({}, "its keys are none; expected "),
        ({"text": None}, "its keys are none; expected "),
        ({"text": "hi", "messages": CHAT}, 'a line has either "text" or "messages", not both'),
        ({"text": 5}, "text: Input should be a valid string"),
        ({"conversations": []}, "conversations: List should have at least 1 item"),
        (
            {"conversations": [{"from": "narrator", "value": "x"}]},
            "0: from is 'narrator'; expected",
        ),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "0: from is "),
        ({"conversations": [{"from": "human"}]}, "with a text as value"),
        ({"prompt": "hi", "completion": CHAT}, "two texts or two lists of messages expected"),
        ({"instruction": 1, "output": "x"}, "instruction: Input should be a valid string"),
        ({"messages": [said("assistant", "", tool_calls=[call("{}") | {"type": "x"}])]}, "a call"),
    ],
)
def test_a_record_of_no_known_form_is_named_by_its_keys(record: Any, says: str) -> None:
    with pytest.raises(ValidationError) as caught:
        document(record)
    assert says in jsonl.reason(caught.value)


def test_what_deep_or_long_things_a_line_holds_ends_in_a_sentence() -> None:
    nested = "[" * 100_000 + "]" * 100_000
    for line in (f'{{"messages": {nested}}}', f'{{"text": "a", "x": {"9" * 100_000}}}'):
        with pytest.raises(ValidationError) as caught:
            Record.model_validate_json(line)
        assert len(jsonl.reason(caught.value)) < 300
    with pytest.raises(ValidationError, match="the text is no JSON"):
        document({"messages": CHAT, "tools": nested})
