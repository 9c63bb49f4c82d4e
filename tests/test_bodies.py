"""Whatever is wrong with a body, the field is told, whichever check stumbles over it."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import params
from fastapi._compat import ModelField
from pydantic import BaseModel, model_validator
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError

from serve.bodies import name_fields
from serve.validation import explain
from serve.wire import UNREADABLE


class Hasty(BaseModel):
    """Looks into what it is given, as vLLM's models do."""

    a: list[int] = []
    b: dict[str, int] = {}
    lazy: Iterable[int] = ()

    @model_validator(mode="before")
    @classmethod
    def _check(cls, data: Any) -> Any:
        if data.get("b") == {"none": 0}:
            raise VLLMValidationError("b cannot be so: {'none': 0}")
        if data.get("b") == {"named": 0}:
            raise VLLMValidationError("no", parameter="b")
        list(data.get("a", []))
        data.get("b", {}).keys()
        return data

    @model_validator(mode="after")
    def _walk(self) -> Hasty:
        self.lazy = list(self.lazy)
        return self


class One(BaseModel):
    c: list[int]


class Other(BaseModel):
    d: int


def said(model: Any, body: Any) -> tuple[str, str | None] | None:
    field = ModelField(name="body", field_info=params.Body(annotation=model))
    route = SimpleNamespace(dependant=SimpleNamespace(body_params=[field]))
    name_fields([route, object()])
    name_fields([route])
    _, errors = field.validate(body, {}, loc=("body",))
    return explain(errors, body) if errors else None


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({}, None),
        ({"a": [1], "b": {"x": 1}}, None),
        ({"a": 5}, ("a: input should be a valid list", "a")),
        ({"b": "x"}, ("b: input should be a valid object", "b")),
        ({"a": [1], "b": [1]}, ("b: input should be a valid object", "b")),
        ({"lazy": [1, [2]]}, ("lazy[1]: input should be a valid integer", "lazy[1]")),
        ({"b": {"none": 0}}, ("the body: b cannot be so", None)),
        ([], ("the body: " + UNREADABLE, None)),
    ],
    ids=lambda given: str(given)[:30],
)
def test_a_check_that_stumbles_is_told_by_the_field_that_does_not_fit(
    body: Any, told: tuple[str, str | None] | None
) -> None:
    assert said(Hasty, body) == told


def test_a_check_that_names_its_field_is_left_alone() -> None:
    with pytest.raises(VLLMValidationError):
        said(Hasty, {"b": {"named": 0}})


def test_of_a_union_the_model_that_is_meant_is_told() -> None:
    assert said(Other | One, {"c": 5}) == ("c: input should be a valid list", "c")
    assert said(Hasty | None, {"a": "x"}) == ("a: input should be a valid list", "a")
    assert said(Hasty | None, {"a": [1]}) is None
    assert said(dict[str, int], {"a": 1}) is None and said(dict[str, int], {"a": "x"}) is not None


@pytest.mark.parametrize("calls", [5, "x", [5], [{"function": 5}]], ids=str)
def test_calls_of_an_earlier_turn_are_looked_at_whole(calls: Any) -> None:
    told = said(ChatCompletionRequest, {"messages": [{"role": "assistant", "tool_calls": calls}]})
    assert told is not None and (told[1] or "").startswith("messages[0]")
