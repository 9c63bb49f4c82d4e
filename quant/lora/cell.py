"""A process apart in which somebody else's chat template is rendered, for so long and no longer.

A template is a program: sandboxed by jinja2 it cannot reach ours, but it can loop for days, ask for
all memory in one multiplication, or hold the interpreter's lock in one power. The cell has limits
on memory, no files, no processes, and is killed when its time is up; the next one starts in its
place. Blocking; one caller at a time. Standard library only.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from threading import Timer
from typing import Any, NamedTuple

from quant.errors import AdapterError
from quant.lora.voice import TEMPLATE, Voice

SECONDS = 2.0  # of one rendering
PATIENCE_S = 20.0  # of one of a model that the user has, on a machine that is busy
START_S = 20.0  # of the first: python and jinja2 are loaded, perhaps by a machine that is busy
LONGEST_ANSWER = 128 << 20  # bytes of JSON
STOPPED = "stopped"
_FATAL = {STOPPED, "MemoryError", "OverflowError", "SecurityError", "SyntaxError",
          "TemplateAssertionError", "TemplateSyntaxError"}  # fmt: skip
LONGEST_TRIED = 256 << 10  # characters that a chat of one short message may become
_WORD = "quantserve asks"
_TOOL = {
    "type": "function",
    "function": {
        "name": "quantserve_looks",
        "description": "Looks.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    },
}
_PROGRAM = Path(__file__).with_name("cell_inmate.py")


class TemplateFault(Exception):
    """The template refused the chat, or broke; the message is its own.

    `kind` names jinja2's or Python's exception, or is STOPPED.
    """

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class Cell:
    """Renders until closed; a template that is stopped costs the process and not the cell."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._inmate: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Cell":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def render(
        self, template: str, variables: Mapping[str, Any], *, continues: bool = False
    ) -> str:
        """The chat as text. TemplateFault says why there is none; TypeError: no JSON in, none out.

        `variables` are the template's: `messages`, `tools`, `add_generation_prompt` and so on.
        """
        told = {"template": template, "variables": variables, "continues": continues}
        order = json.dumps(told).encode() + b"\n"
        if self._inmate is None:
            self._inmate = _started()
            self._ask(self._inmate, _HELLO, START_S)
        answer = self._ask(self._inmate, order, self._seconds)
        if "error" in answer:
            raise TemplateFault(answer["error"], answer["kind"])
        return str(answer["text"])

    def close(self) -> None:
        if self._inmate is not None:
            self._inmate.kill()
            self._inmate.communicate()
            self._inmate = None

    def _ask(self, inmate: subprocess.Popen[bytes], order: bytes, seconds: float) -> dict[str, Any]:
        assert inmate.stdin is not None and inmate.stdout is not None
        stop = Timer(seconds, inmate.kill)
        stop.start()
        line = b""
        try:
            with suppress(BrokenPipeError):
                inmate.stdin.write(order)
                inmate.stdin.flush()
                line = inmate.stdout.readline(LONGEST_ANSWER)
        finally:
            stop.cancel()
        if not line.endswith(b"\n"):
            self._inmate = None
            inmate.kill()
            inmate.communicate()
            why = f"it took more than {seconds:g} s, or more memory than it may have"
            raise TemplateFault(why, STOPPED)
        answer: dict[str, Any] = json.loads(line)
        return answer


def check(voice: Voice, folder: Path) -> None:
    """AdapterError where a template is none, or makes no text of any short chat within its limits.

    One may ask for a system message, for tools, or for content in parts: all are tried.
    """
    for name, text in voice.templates.items():
        fault = _tried(text).fault
        if fault is not None:
            which = "" if name == "default" else f" {name}"
            raise AdapterError(f"{folder}: its chat template{which}: {fault}", field=TEMPLATE)


@lru_cache(maxsize=64)
def broken(template: str) -> str | None:
    """Why it is no template, or does not end; None where it ends, whatever it says of a chat."""
    with Cell(PATIENCE_S) as cell:
        for messages, tools in _chats():
            variables = {"messages": messages, "tools": tools, "add_generation_prompt": True}
            try:
                cell.render(template, variables | _TOKENS)
            except TemplateFault as fault:
                if fault.kind in _FATAL:
                    return str(fault)
    return None


def wants_lists(voice: Voice) -> bool:
    """Whether a message's content must come as a list of parts, plain text not being taken."""
    return any(_tried(text).lists for text in voice.templates.values())


class _Tried(NamedTuple):
    lists: bool = False
    fault: str | None = None


@lru_cache(maxsize=64)
def _tried(template: str) -> _Tried:
    """What becomes of short chats: the first that shows its message decides on lists.

    A fault is that of the plainest chat, unless one is for good.
    """
    first, written = "", False
    with Cell() as cell:
        for messages, tools in _chats():
            variables = {"messages": messages, "tools": tools, "add_generation_prompt": True}
            try:
                text = cell.render(template, variables | _TOKENS)
            except TemplateFault as fault:
                if fault.kind in _FATAL:
                    return _Tried(fault=str(fault))
                first = first or str(fault)
                continue
            if len(text) > LONGEST_TRIED:
                return _Tried(
                    fault=f"it makes {len(text)} characters of one short message, at most"
                    f" {LONGEST_TRIED}"
                )
            if _WORD in text and "'type': 'text'" not in text:  # a list that was printed as one
                return _Tried(lists=isinstance(messages[-1]["content"], list))
            written = written or bool(text.strip())
    return _Tried(fault=None if written else first or "it makes nothing of a message")


def _chats() -> Iterator[tuple[list[dict[str, Any]], list[Any] | None]]:
    """One short chat, said in every way that a template may insist on."""
    for tools in (None, [_TOOL]):
        for content in (_WORD, [{"type": "text", "text": _WORD}]):
            asked = {"role": "user", "content": content}
            yield [asked], tools
            yield [{**asked, "role": "system"}, asked], tools


def _started() -> subprocess.Popen[bytes]:
    """Isolated from our environment and our modules."""
    return subprocess.Popen(
        [sys.executable, "-I", str(_PROGRAM)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={},
        start_new_session=True,  # a terminal's Ctrl-C is for us
    )  # fmt: skip


_HELLO = json.dumps({"template": "", "variables": {}, "continues": False}).encode() + b"\n"
_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
