"""The tables of forms: each one can be found, and vLLM knows every parser by its name."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager

from serve import parsers
from serve.forms import REASONING, TOOLS, Form
from serve.parsers import Model
from tests.test_vllm_releases import fetched

REGISTRIES = {"tool_parsers": TOOLS, "reasoning": REASONING}


class Tokenizer:
    """As much of one as parsers ask for when they are made: a vocabulary."""

    all_special_tokens: tuple[str, ...] = ()
    name_or_path = "a model"

    def __init__(self, *tokens: str) -> None:
        self.vocab = {token: number for number, token in enumerate(("a", *tokens))}

    def get_vocab(self) -> dict[str, int]:
        return self.vocab

    def encode(self, text: str, **_: object) -> list[int]:
        return [0 for _ in text]


def model_of(form: Form, template: str = "") -> Model:
    family = form.families[0] if form.families else ""
    vocabulary = " ".join(f'"{token}"' for token in form.tokens).encode()
    return Model(family, template, template, {}, vocabulary)


@pytest.mark.parametrize("form", TOOLS, ids=lambda form: form.parser)
def test_no_form_of_tools_hides_behind_another(form: Form) -> None:
    """Its marks together, whatever else the template has, are read by its own parser."""
    template = "{% if tools %}{{ tools }}" + " ".join(form.marks) + "{% endif %}"
    assert parsers.tool_parser(model_of(form, template), written=True).name == form.parser


@pytest.mark.parametrize("form", REASONING, ids=lambda form: form.parser)
def test_no_form_of_thoughts_hides_behind_another(form: Form) -> None:
    template = "{% raw %}" + " ".join(form.marks[:1]) + "{% endraw %}"
    assert parsers.reasoning_parser(model_of(form, template)).name == form.parser


@pytest.mark.parametrize("form", [*TOOLS, *REASONING], ids=lambda form: form.parser)
def test_a_parser_starts_with_the_tokens_that_its_form_names(form: Form) -> None:
    """One that wants more would end the start of a server for which nobody asked for it."""
    found = ToolParserManager if form in TOOLS else ReasoningParserManager
    get = found.get_tool_parser if form in TOOLS else found.get_reasoning_parser
    made = get(form.parser)(Tokenizer(*form.tokens))
    assert made is not None
    if form.tokens:
        with pytest.raises((RuntimeError, ValueError), match="token"):
            get(form.parser)(Tokenizer(*form.tokens[1:]))


@pytest.mark.parametrize("release", ["installed", "next"])
@pytest.mark.parametrize("package", sorted(REGISTRIES))
def test_both_releases_of_vllm_know_every_name(release: str, package: str) -> None:
    spec = find_spec("vllm")
    assert spec is not None and spec.origin is not None
    top = Path(spec.origin).parent if release == "installed" else fetched() / "vllm"
    names = parsers.registered((top / package / "__init__.py").read_text("utf-8"))
    strangers = {form.parser for form in REGISTRIES[package]} - set(names)
    assert len(names) > 30 and not strangers


def test_names_are_read_as_vllm_registers_them() -> None:
    assert set(parsers.known("tool")) == set(ToolParserManager.list_registered())
    assert set(parsers.known("reasoning")) == set(ReasoningParserManager.list_registered())
