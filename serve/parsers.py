"""Which of vLLM's parsers read what a model writes: calls of tools, and thoughts.

A model writes them as its chat template shows them, so the template decides, by marks that stand in
it; where two forms share their marks, and where vLLM writes a model's chats without a template, the
model type does. A parser that needs tokens is picked only where the vocabulary has them, for it
would end the start. Imports neither torch nor vLLM: the parent of a server asks as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quant.lora.cell import Cell, TemplateFault
from serve.errors import SettingsError
from serve.forms import REASONING, TOOLS, Form
from serve.settings import Settings

AUTO, NONE = "auto", "none"
UNWRITTEN = (
    "the chat template writes no tools: the model is not told of them, and calls one only where a "
    "request requires it"
)
_ASKS, _ANSWERS = "quantserve asks", "quantserve answers"
_SAMPLE = {
    "type": "function",
    "function": {
        "name": "quantserve_tool",
        "description": "a tool",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "description": "a place"}},
            "required": ["place"],
        },
    },
}


@dataclass(frozen=True, slots=True)
class Pick:
    """A parser, or None, and what decided it."""

    name: str | None
    why: str


@dataclass(frozen=True, slots=True)
class Parsers:
    """What reads a model's answers; `written`: whether its chats tell it of tools at all."""

    tools: Pick = field(default_factory=lambda: Pick(None, "nobody asked"))
    reasoning: Pick = field(default_factory=lambda: Pick(None, "nobody asked"))
    written: bool = True

    def told(self) -> list[str]:
        """For whoever starts the server, a line each."""
        lines = [f"tool parser: {self.tools.name or NONE} ({self.tools.why})"]
        if self.tools.name and not self.written:
            lines.append(UNWRITTEN)
        return [*lines, f"reasoning parser: {self.reasoning.name or NONE} ({self.reasoning.why})"]


@dataclass(frozen=True, slots=True)
class Model:
    """A folder's way of speaking, as far as its files tell; `template` is "" where it has none."""

    type: str
    template: str
    tool_template: str
    tokens: Mapping[str, Any]  # the named ones, which templates write
    vocabulary: bytes  # the files that list tokens

    def has(self, tokens: Sequence[str]) -> bool:
        written = ((json.dumps(t), json.dumps(t, ensure_ascii=False)) for t in tokens)
        return all(any(w.encode() in self.vocabulary for w in ways) for ways in written)

    def renders(self, template: str, **variables: Any) -> str | None:
        """The chat as text; None where the template does not take it."""
        return _rendered(template, json.dumps({**_VARIABLES, **self.tokens, **variables}))


_QUESTION = [{"role": "user", "content": _ASKS}]
_ANSWERED = [*_QUESTION, {"role": "assistant", "content": _ANSWERS}]
_VARIABLES = {"messages": _QUESTION, "tools": None, "documents": None,
              "add_generation_prompt": True}  # fmt: skip


@lru_cache(maxsize=32)
def _rendered(template: str, variables: str) -> str | None:
    with Cell() as cell:
        try:
            return cell.render(template, json.loads(variables))
        except TemplateFault:
            return None


def choose(settings: Settings) -> Parsers:
    """The parsers for what is served. SettingsError for a name that vLLM does not know."""
    given = _Flags(settings.vllm_flags)
    model = read(settings.artifact, given.value("--chat-template"))
    asked = given.value("--tool-call-parser"), given.value("--reasoning-parser")
    written = writes_tools(model)
    if given.has("--no-enable-auto-tool-choice"):
        tools = Pick(None, "--no-enable-auto-tool-choice")
    elif asked[0]:
        tools = Pick(asked[0], "--tool-call-parser")
    elif settings.tool_parser != AUTO:
        tools = _named(settings.tool_parser, "tool", given)
    else:
        tools = tool_parser(model, written=written)
    if asked[1]:
        reasoning = Pick(asked[1], "--reasoning-parser")
    elif settings.reasoning_parser != AUTO:
        reasoning = _named(settings.reasoning_parser, "reasoning", given)
    else:
        reasoning = reasoning_parser(model)
    return Parsers(tools, reasoning, written)


def flags(parsers: Parsers, given: Sequence[str]) -> list[str]:
    """For vLLM's command line, without what the operator has given already."""
    there, added = _Flags(given), []
    if parsers.tools.name and not there.has("--enable-auto-tool-choice"):
        added += ["--enable-auto-tool-choice"]
    if parsers.tools.name and not there.has("--tool-call-parser"):
        added += ["--tool-call-parser", parsers.tools.name]
    if parsers.reasoning.name and not there.has("--reasoning-parser"):
        added += ["--reasoning-parser", parsers.reasoning.name]
    return added


def tool_parser(model: Model, *, written: bool) -> Pick:
    """By the first form of TOOLS that the template has."""
    found = _fitting(TOOLS, model, model.tool_template)
    if not found and not model.template:
        return Pick(None, "the model has no chat template")
    if not written:
        return Pick(None, "the chat template writes no tools")
    for form in found:
        if model.has(form.tokens):
            return Pick(form.parser, _because(form, model))
    if found:
        return Pick(None, f"the template has the form of {found[0].parser}, but the vocabulary "
                    f"lacks {', '.join(found[0].tokens)}")  # fmt: skip
    return Pick(None, "none is known for this chat template; --tool-parser names one")


@lru_cache(maxsize=64)
def form_of(template: str, model_type: str) -> str | None:
    """The parser that reads the calls which a template shows, whatever the vocabulary has."""
    found = _fitting(TOOLS, Model(model_type, template, template, {}, b""), template)
    return found[0].parser if found else None


def reasoning_parser(model: Model) -> Pick:
    """By the first form of REASONING, where the template makes the model think.

    A parser takes all that comes before the end of a thought for thought: where a model does not
    think, its answers would be gone. That a template can show thoughts is therefore not enough.
    """
    found = [form for form in _fitting(REASONING, model, model.template) if model.has(form.tokens)]
    if not found:
        return Pick(None, "the chat template knows no thoughts")
    form = found[0]
    if not form.marks:
        return Pick(form.parser, _because(form, model))
    if why := _thinks(model, form.marks[0]):
        return Pick(form.parser, why)
    return Pick(None, f"the chat template can show {form.marks[0]} and does not demand it; "
                f"--reasoning-parser {form.parser} takes thoughts out of answers")  # fmt: skip


def writes_tools(model: Model) -> bool:
    """Whether chats differ with a tool and without; a template that cannot say is believed."""
    if any(not form.marks for form in _fitting(TOOLS, model, "")):
        return True  # vLLM writes its chats, not a template
    plain = model.renders(model.template)
    told = None if plain is None else model.renders(model.tool_template, tools=[_SAMPLE])
    return "tools" in model.tool_template if told is None else told != plain


def read(folder: Path, given: str | None = None) -> Model:
    """A model's folder; `given` is a template, or the path of one, that goes before its own."""
    config, tokenizer = _object(folder / "config.json"), _object(folder / "tokenizer_config.json")
    templates = _templates(folder, tokenizer.get("chat_template"))
    if given is not None:
        path = Path(given)
        text = _text(path) if "{" not in given and path.is_file() else given
        templates = {"default": text}
    default = templates.get("default", "")
    named = {name: _content(tokenizer.get(name)) for name in ("bos_token", "eos_token")}
    lists = ("tokenizer.json", "added_tokens.json", "tokenizer_config.json")
    return Model(
        type=str(config.get("model_type", "")),
        template=default,
        tool_template=templates.get("tool_use", default),
        tokens={name: text for name, text in named.items() if text is not None},
        vocabulary=b"".join(_bytes(folder / name) for name in lists),
    )


def known(kind: str) -> list[str]:
    """The parsers in the registry of the installed vLLM; `kind` is tool or reasoning.

    Read from its source: to import it takes ten seconds and more.
    """
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        return []
    package = {"tool": "tool_parsers", "reasoning": "reasoning"}[kind]
    return registered((Path(spec.origin).parent / package / "__init__.py").read_text("utf-8"))


def registered(source: str) -> list[str]:
    """The names in the table of one of vLLM's registries."""
    return sorted(re.findall(r'^    "([\w.-]+)": \(', source, re.MULTILINE))


def _named(name: str, kind: str, given: _Flags) -> Pick:
    why = f"--{kind}-parser"
    if name == NONE:
        return Pick(None, why)
    names = known(kind)
    if name not in names and not given.has(f"--{kind}-parser-plugin"):
        near = get_close_matches(name, names, n=3, cutoff=0.4) or names
        raise SettingsError(
            f"{why} {name!r} is no {kind} parser of vLLM's; expected {AUTO}, {NONE} or one of its "
            f"{len(names)}, such as {', '.join(near[:5])}"
        )
    return Pick(name, why)


def _fitting(forms: Sequence[Form], model: Model, template: str) -> list[Form]:
    text = template.replace('\\"', '"')
    return [
        form
        for form in forms
        if all(mark in text for mark in form.marks)
        and (not form.families or model.type.startswith(form.families))
    ]


def _because(form: Form, model: Model) -> str:
    marks = f"the chat template writes {' and '.join(form.marks)}" if form.marks else ""
    family = f"the model type is {model.type}" if form.families else ""
    return ", ".join(filter(None, (marks, family)))


def _thinks(model: Model, opening: str) -> str:
    """How the template makes the model think; empty where it does not."""
    closing = opening.replace("<", "</", 1)
    asked = model.renders(model.template)
    if asked is None:
        return ""
    if asked.rfind(opening) > asked.rfind(closing):
        return f"the chat template opens {opening} for every answer"
    shown = model.renders(model.template, messages=_ANSWERED, add_generation_prompt=False) or ""
    before = shown.partition(_ASKS)[2].partition(_ANSWERS)[0]
    switched = model.renders(model.template, enable_thinking=False)
    if opening in before and closing in before and switched != asked:
        return f"the chat template writes {opening} before every answer"
    return ""


class _Flags:
    """vLLM's flags as the operator gave them; argparse takes `--a_b` and `--a=b` as well."""

    def __init__(self, given: Sequence[str]) -> None:
        self._given: dict[str, str | None] = {}
        for place, word in enumerate(given):
            if word.startswith("--"):
                name, equals, value = word.partition("=")
                after = given[place + 1] if place + 1 < len(given) else None
                self._given[name.replace("_", "-")] = value if equals else after

    def has(self, name: str) -> bool:
        return name in self._given

    def value(self, name: str) -> str | None:
        return self._given.get(name)


def _templates(folder: Path, configured: object) -> dict[str, str]:
    """By name; a file goes before what tokenizer_config.json says, as transformers reads them."""
    found: dict[str, str] = {}
    if isinstance(configured, str):
        found = {"default": configured}
    elif isinstance(configured, list):
        pairs = [(e.get("name"), e.get("template")) for e in configured if isinstance(e, dict)]
        found = {n: t for n, t in pairs if isinstance(n, str) and isinstance(t, str)}
    processor = _object(folder / "chat_template.json").get("chat_template")
    if isinstance(processor, str):
        found["default"] = processor
    if text := _text(folder / "chat_template.jinja"):
        found["default"] = text
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = _text(path)
    return found


def _object(path: Path) -> dict[str, Any]:
    """A JSON object, empty where the file has none: what is wrong with it, vLLM will say."""
    try:
        told = json.loads(_bytes(path) or b"{}")
    except (ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _text(path: Path) -> str:
    return _bytes(path).decode(errors="replace")


def _content(token: object) -> str | None:
    """A named token: text, or an object that holds it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
