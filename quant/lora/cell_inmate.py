"""The program in the cell: renders chat templates for whoever holds the other end of the pipe.

Run by its path, never imported: it needs jinja2 and nothing of ours. Takes a JSON line of
`template`, `variables` and `continues`, answers with one of `text` or `error`. Before it reads the
first one it gives up every right it does not need. The environment is the one transformers renders
with, so a template means the same here and there.
"""

import json
import resource
import sys
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 512 << 20  # bytes of address space
LONGEST = 16 << 20  # characters of a rendered chat
KEPT = 16  # compiled templates
MARK = "CONTINUE_HERE "
FAULTS = (
    jinja2.TemplateError, ArithmeticError, AssertionError, AttributeError, ImportError, LookupError,
    MemoryError, NameError, OSError, RuntimeError, StopIteration, SyntaxError, TypeError,
    ValueError,
)  # fmt: skip


class Generation(jinja2.ext.Extension):
    """`{% generation %}`, with which templates mark what training learns from: nothing to us."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's interface

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = to_json
    made.globals |= {"raise_exception": refuse, "strftime_now": now}
    return made


def to_json(
    value: Any,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002 - in the order of transformers
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    """Without jinja2's escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def now(form: str) -> str:
    return datetime.now().strftime(form)


def refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def render(template: jinja2.Template, variables: dict[str, Any], *, continues: bool) -> str:
    """The chat as text; `continues`: cut off where the last message ends."""
    last = mark(variables["messages"]) if continues else ""
    pieces, length = [], 0
    for piece in template.generate(**variables):
        length += len(piece)
        if length > LONGEST:
            raise ValueError(f"the chat is longer than {LONGEST} characters")
        pieces.append(piece)
    text = "".join(pieces)
    if not continues:
        return text
    at = text.rfind(MARK.strip())
    if at < 0 or last.strip() not in text:
        raise ValueError("the template does not write the final message, which was to go on")
    return text[:at] if text.startswith(MARK, at) else text[:at].rstrip()


def mark(messages: list[dict[str, Any]]) -> str:
    """Puts a mark behind the last message's text; returns that text."""
    final, content = messages[-1], messages[-1].get("content")
    if isinstance(content, list):
        final = next((p for p in reversed(content) if "text" in p), {})
        content = final.get("text")
    if not isinstance(content, str):
        raise ValueError("the final message has no text that could go on")  # noqa: TRY004
    final["text" if "text" in final else "content"] = content + MARK
    return content


def give_up_rights() -> None:
    """No files, no processes, little memory."""
    for what, most in (
        (resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NOFILE, 3),
        (resource.RLIMIT_NPROC, 0), (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        resource.setrlimit(what, (most, most))


class Room:
    """An environment and the templates it has compiled."""

    def __init__(self) -> None:
        self._made, self._compiled = environment(), dict[str, jinja2.Template]()

    def answer(self, line: bytes) -> bytes:
        told: dict[str, str]
        try:
            order = json.loads(line)
            template = self._template(order["template"])
            told = {"text": render(template, order["variables"], continues=order["continues"])}
        except FAULTS as fault:
            kind = type(fault).__name__
            told = {"error": str(fault)[:1000] or kind, "kind": kind}
        return json.dumps(told).encode() + b"\n"

    def _template(self, text: str) -> jinja2.Template:
        if text not in self._compiled:
            if len(self._compiled) >= KEPT:
                self._compiled.clear()
            self._compiled[text] = self._made.from_string(text)
        return self._compiled[text]


def main() -> None:
    room = Room()
    # What jinja2 and the C library open late, they open before files are forbidden.
    room.answer(
        json.dumps({
            "template": "{{ strftime_now('%Y') }}{{ lipsum(n=1) }}{{ raise_exception('') }}",
            "variables": {}, "continues": False,
        }).encode()
    )  # fmt: skip
    give_up_rights()
    while line := sys.stdin.buffer.readline():
        sys.stdout.buffer.write(room.answer(line))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
