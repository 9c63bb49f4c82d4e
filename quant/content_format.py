"""Whether a chat template reads a message's content as one string or as a list of parts.

vLLM tells by the template's syntax tree, in renderers/hf.py: a loop over contents is what a
template of parts has. The same walk, so that we give a template what the server does.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

ContentFormat = Literal["string", "openai"]


class _Generation(Extension):
    """Lets `{% generation %}` be parsed."""

    tags = {"generation"}  # noqa: RUF012 # jinja's own

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Unclear(Exception):
    """A loop or an assignment that vLLM gives up at."""


@lru_cache(maxsize=8)
def read_by(template: str) -> ContentFormat:
    """What `template` reads: "string", or "openai" for parts; "string" where that is unclear."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    try:
        tree = environment.parse(template)
        return "openai" if _loops_over_contents(tree) else "string"
    except (jinja2.TemplateError, RecursionError, _Unclear):
        return "string"


def _loops_over_contents(tree: nodes.Template) -> bool:
    said = _message_names(tree)
    inside: dict[int, set[str]] = {}  # loops in macros: the parameters that are given a content
    for macro in tree.find_all(nodes.Macro):
        given = set(_given_contents(tree, macro, said))
        for loop in macro.find_all(nodes.For):
            inside[id(loop)] = given or inside.get(id(loop), given)
    for loop in tree.find_all(nodes.For):
        name = loop.iter.name if isinstance(loop.iter, nodes.Name) else None
        passed = name is not None and name in inside.get(id(loop), ("content",))
        if passed or any(_reads(loop.iter, message, "content") for message in said):
            _name(loop.target)
            return True
    return False


def _message_names(tree: nodes.Template) -> list[str]:
    """What the template calls a message, in loops over messages under any of their names."""
    lists = ["messages"]
    for known in lists:  # grows while it is walked
        for assign in tree.find_all(nodes.Assign):
            if _reads(assign.node, known) and (name := _name(assign.target)) not in lists:
                lists.append(name)
    loops = tree.find_all(nodes.For)
    return [_name(loop.target) for loop in loops if any(_reads(loop.iter, k) for k in lists)]


def _given_contents(tree: nodes.Template, macro: nodes.Macro, said: list[str]) -> Iterator[str]:
    """Parameters of a macro to which some call gives a message's content."""
    names = [argument.name for argument in macro.args]
    for call in tree.find_all(nodes.Call):
        if not isinstance(call.node, nodes.Name) or call.node.name != macro.name:
            continue
        given = list(zip(names, call.args, strict=False))
        given += [(word.key, word.value) for word in call.kwargs if word.key in names]
        yield from (
            name for name, value in given if any(_reads(value, each, "content") for each in said)
        )


def _reads(node: nodes.Node | None, name: str, key: str | None = None) -> bool:
    """Whether it is the variable, or its `key`, filtered or sliced."""
    while isinstance(node, nodes.Filter | nodes.Test) or (
        isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    ):
        node = node.node
    if key is not None:
        if isinstance(node, nodes.Getitem):
            matches = isinstance(node.arg, nodes.Const) and node.arg.value == key
        else:
            matches = isinstance(node, nodes.Getattr) and node.attr == key
        return matches and _reads_plainly(node.node, name)  # type: ignore[union-attr]
    return _reads_plainly(node, name)


def _reads_plainly(node: nodes.Node | None, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name


def _name(target: nodes.Node) -> str:
    if not isinstance(target, nodes.Name):
        raise _Unclear
    return target.name
