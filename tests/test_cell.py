"""The cell: it renders what transformers renders, and lets nobody out and nothing run on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from quant.errors import AdapterError
from quant.lora import cell
from quant.lora.cell import Cell, TemplateFault
from quant.lora.voice import Voice
from tests.tiny import CHAT_TEMPLATE

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüß dich! <b> \U0001f600"},
    {"role": "assistant", "content": "Hello"},
]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"a": ["b", 1, None]}}}]
TEMPLATES = {
    "chatml": CHAT_TEMPLATE,
    "blocks": "{%- for m in messages %}\n  {%- if loop.first and m.role == 'system' %}\n"
    "    S:{{ m.content }}\n  {% else %}\n{{ m.role|upper }}: {{ m.content|trim }}\n  {% endif %}\n"
    "{%- endfor %}\n{% if add_generation_prompt %}A:{% endif %}",
    "tools": "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{{ messages | tojson }}",
    "generation": "{% set ns = namespace(n=0) %}{% for m in messages %}{% generation %}"
    "{% set x = 1 %}{{ m.content }}{% set ns.n = ns.n + 1 %}{% endgeneration %}"
    "{{ x is defined }}{{ ns.n }}{% endfor %}",
    "controls": "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}"
    "{{ m.content }}{% if loop.index > 1 %}{% break %}{% endif %}{% endfor %}{{ bos_token }}",
}

SYSTEM = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
DEMANDING = (
    SYSTEM + "{{ messages[1].content }}",
    "{% for tool in tools %}{{ tool.function.name }}{% endfor %}{{ messages[0].content }}",
)


@pytest.fixture(scope="module")
def room() -> Iterator[Cell]:
    with Cell(seconds=10) as made:
        yield made


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_is_what_transformers_makes_of_it(room: Cell, name: str, tools: Any) -> None:
    variables = {"tools": tools, "add_generation_prompt": True, "bos_token": "<s>"}
    (theirs,), _ = render_jinja_template([CHAT], chat_template=TEMPLATES[name], **variables)
    assert room.render(TEMPLATES[name], {**variables, "messages": CHAT}) == theirs


@pytest.mark.parametrize("content", ["Hello", "Hello \n", [{"type": "text", "text": "Hel"}]])
def test_a_last_message_can_be_continued(room: Cell, content: Any) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}" \
        "{% else %}{{ m.content[0].text }}{% endif %}</s>{% endfor %}"  # fmt: skip
    chat = [CHAT[1], {"role": "assistant", "content": content}]
    (theirs,), _ = render_jinja_template(
        [chat], chat_template=template, continue_final_message=True
    )
    assert room.render(template, {"messages": chat}, continues=True) == theirs
    with pytest.raises(TemplateFault, match="final message"):
        room.render("nothing", {"messages": chat}, continues=True)


def test_what_a_template_says_of_a_chat_is_told(room: Cell) -> None:
    with pytest.raises(TemplateFault, match="roles must alternate") as fault:
        room.render("{{ raise_exception('roles must alternate') }}", {"messages": []})
    assert fault.value.kind == "TemplateError"
    assert room.render("{{ strftime_now('%Y') }}", {}).isdecimal()


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ tools.x.y }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ 'x' * 10**11 }}",
        "{{ 'x'|center(10**11) }}",
        "{% for a in range(90000) %}{{ 'x' * 10000 }}{% endfor %}",
        "{% macro r() %}{{ r() }}{% endmacro %}{{ r() }}",
    ],
)
def test_no_way_out_and_no_flood(room: Cell, attack: str) -> None:
    with pytest.raises(TemplateFault):
        room.render(attack, {"messages": [], "tools": None})
    assert room.render("still {{ here }}", {"here": "here"}) == "still here"


@pytest.mark.parametrize(
    "attack",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ (9 ** 99999) ** 99999 }}",
    ],
    ids=["loop", "one-operation"],
)
def test_a_template_that_does_not_end_is_ended(attack: str) -> None:
    with Cell(seconds=0.5) as short:
        began = time.monotonic()
        with pytest.raises(TemplateFault) as fault:
            short.render(attack, {"messages": []})
        assert fault.value.kind == cell.STOPPED
        assert time.monotonic() - began < 20, "it hung"
        assert short.render("{{ 1 + 1 }}", {}) == "2"


def test_the_cell_sees_neither_environment_nor_files(room: Cell) -> None:
    room.render("", {})
    assert room._inmate is not None
    seen = Path(f"/proc/{room._inmate.pid}")
    assert (seen / "environ").read_bytes().strip(b"\0").count(b"=") <= 1  # LC_CTYPE, python's own
    limits = {line[:26].strip(): line[26:].split()[0] for line in
              (seen / "limits").read_text().splitlines()}  # fmt: skip
    assert limits["Max open files"] == "3" and limits["Max file size"] == "0"
    assert int(limits["Max address space"]) == 512 << 20


def test_it_is_found_out_how_content_must_come() -> None:
    parts = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    assert cell.wants_lists(Voice(templates={"default": parts}))
    for text in (CHAT_TEMPLATE, "{{ messages }}", *DEMANDING):
        own = Voice(templates={"default": text})
        cell.check(own, Path("lora"))
        assert not cell.wants_lists(own)


@pytest.mark.parametrize(
    ("useless", "why"),
    [
        ("{{ raise_exception('never') }}", "never"),
        ("{% include 'x' %}", "include|loader"),
        ("{% if true %}" * 2000 + "x" + "{% endif %}" * 2000, "nested|recursion"),
        ('{{ "" }}', "nothing of a message"),
        ("\n \n", "nothing of a message"),
        ("{{ 'x' * 1000000 }}", "1000000 characters"),
        ("{{ messages[5].content }}{{ tools.x.y }}", "undefined|None|no element"),
    ],
    ids=["raises", "include", "nested", "empty", "blank", "flood", "undefined"],
)
def test_a_template_that_no_chat_gets_through_is_refused(useless: str, why: str) -> None:
    with pytest.raises(AdapterError, match=f"(?i)chat template tool_use: .*({why})"):
        cell.check(Voice(templates={"tool_use": useless}), Path("lora"))


@pytest.mark.parametrize("broken", ["{% if %}", "{{ 'x'|nofilter }}", "{{ ''.__class__.x }}"])
def test_a_template_that_is_none_is_refused(broken: str) -> None:
    with pytest.raises(AdapterError, match="chat template") as refusal:
        cell.check(Voice(templates={"default": broken}), Path("lora"))
    assert refusal.value.field == "chat_template.jinja"
