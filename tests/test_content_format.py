"""`quant.content_format`: templates of strings and of parts are told apart as vLLM does it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from vllm.renderers import hf

from quant import content_format
from tests import chats

LOOP = "{% for m in messages %}{% for part in m.content %}{{ part }}{% endfor %}{% endfor %}"
HARD = {
    "renamed": "{% set all = messages[1:] %}{% for m in all %}{% for p in m['content'] | list %}"
    "{% endfor %}{% endfor %}",
    "renamed twice": "{% set a = messages %}{% set b = a %}{% for m in b %}{% for p in m.content %}"
    "{% endfor %}{% endfor %}",
    "its own name": "{% set messages = messages %}" + LOOP,
    "a name for content": "{% for m in messages %}{% set content = m.content %}"
    "{% for p in content %}{% endfor %}{% endfor %}",
    "a namespace": "{% set ns = namespace() %}{% set ns.all = messages %}" + LOOP,
    "pairs": "{% for a, b in messages %}{% endfor %}" + LOOP,
    "pairs of parts": "{% for m in messages %}{% for a, b in m.content %}{% endfor %}{% endfor %}",
    "a macro that is given none": "{% macro f(content) %}{% for p in content %}{% endfor %}"
    "{% endmacro %}{% for m in messages %}{{ f(m.role) }}{% endfor %}",
    "a macro by name": "{% macro f(x) %}{% for p in x %}{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ f(x=m.content) }}{% endfor %}",
    "a test": "{% for m in messages %}{% for p in m.content is string %}{% endfor %}{% endfor %}",
    "marked": "{% for m in messages %}{% generation %}{% for p in m.content %}{% endfor %}"
    "{% endgeneration %}{% endfor %}",
    "marked text": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% endfor %}",
    "another loop": "{% for m in messages %}{% for c in m.tool_calls %}{% endfor %}{% endfor %}",
    "broken": "{% for m in messages %}",
    "empty": "",
}


def packaged() -> dict[str, str]:
    """The templates that vLLM brings along."""
    home = Path(next(iter(find_spec("vllm").submodule_search_locations)))  # type: ignore[arg-type, union-attr]
    folder = home / "transformers_utils" / "chat_templates"
    return {path.stem: path.read_text("utf-8") for path in sorted(folder.glob("*.jinja"))}


@pytest.mark.parametrize("template", [*chats.TEMPLATES.values(), *HARD.values(), LOOP])
def test_a_template_is_read_as_vllm_reads_it(template: str) -> None:
    expected = hf._detect_content_format(template, default="string")
    assert content_format.read_by(template) == expected


def test_vllms_own_templates_are_read_as_it_reads_them() -> None:
    found = packaged()
    assert len(found) >= 5
    for name, template in found.items():
        expected = hf._detect_content_format(template, default="string")
        assert content_format.read_by(template) == expected, name


def test_both_kinds_are_among_them() -> None:
    assert content_format.read_by(chats.PARTS) == "openai"
    assert content_format.read_by(chats.CHATML) == "string"
