"""Whose defaults, stops and template a request gets: those of the version it holds."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams

from quant.lora.cell import TemplateFault
from quant.lora.voice import Voice
from serve.adapters.pool import Version
from serve.adapters.store import Stored
from serve.turn import Turn, current
from serve.voices import Defaults, Templates, add_stops


def tokenizer(template: str | None = None, **tokens: str) -> Any:
    """The base's, as far as it is asked."""
    return SimpleNamespace(chat_template=template, special_tokens_map=tokens)


HELLO = [{"role": "user", "content": "hi"}]
SHOUT = "{% for m in messages %}{{ bos_token }}{{ m.role }}:{{ m.content|upper }};{% endfor %}"


def speak(**own: Any) -> None:
    """From here on the test is a request that holds a version with this voice."""
    stored = Stored("d" * 64, Path(), 4, 0, Voice(**own))
    current.set(Turn(version=Version("legal", stored, 1, 0.0)))


@pytest.fixture
def templates() -> Iterator[Templates]:
    made = Templates()
    yield made
    made.close()


def test_defaults_are_the_versions_then_the_bases() -> None:
    defaults = Defaults({"temperature": 0.7, "top_p": 0.9})
    assert defaults.get("temperature", 1.0) == 0.7
    speak(defaults={"temperature": 0.0, "max_tokens": 5})
    found = [defaults.get(name, 1) for name in ("temperature", "top_p", "max_tokens", "top_k")]
    assert found == [0.0, 0.9, 5, 1]
    current.set(None)
    assert defaults.get("max_tokens") is None
    assert Defaults({}), "an empty one is not replaced by {}"


def test_stops_are_added_where_the_client_has_none() -> None:
    speak(eos=(7, 8), stop=("END", "STOP!"))
    plain = SamplingParams()
    add_stops(plain)
    assert sorted(plain.stop_token_ids or []) == [7, 8]
    assert plain.stop == ["END", "STOP!"] and plain.output_text_buffer_length == 4
    asked = SamplingParams(stop=["."], stop_token_ids=[2], ignore_eos=True)
    add_stops(asked)
    assert (asked.stop, asked.stop_token_ids) == (["."], [2])
    current.set(Turn())
    base = SamplingParams()
    add_stops(base)
    assert (base.stop, base.stop_token_ids) == ([], [])


async def test_each_version_renders_with_its_own_template(templates: Templates) -> None:
    base = tokenizer("the base's", bos_token="<s>", eos_token="</s>")

    async def shown(**own: Any) -> str | None:
        speak(**own)
        return await templates.render(HELLO, base, {"tools": None, "tokenize": False})

    mine = {"default": SHOUT}
    found = await asyncio.gather(
        *(asyncio.create_task(task) for task in (
            shown(templates=mine), shown(templates=mine, tokens={"bos_token": "<!>"}), shown(),
            shown(templates={"default": "{{ eos_token }}{{ tools }}"}),
        ))
    )  # fmt: skip
    assert found == ["<s>user:HI;", "<!>user:HI;", None, "</s>None"]


async def test_tools_choose_their_template(templates: Templates) -> None:
    speak(templates={"default": "plain", "tool_use": "{{ tools[0].name }}"})
    assert await templates.render(HELLO, tokenizer(), {"tools": [{"name": "look"}]}) == "look"
    assert await templates.render(HELLO, tokenizer(), {"tools": []}) == "plain"


async def test_content_comes_as_the_template_reads_it(templates: Templates) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    speak(templates={"default": "{{ messages[0].content }}"})
    assert await templates.render([{"role": "user", "content": parts}], tokenizer(), {}) == "a\nb"
    speak(templates={"default": "{{ messages[0].content[0].text }}"}, lists=True)
    assert await templates.render(HELLO, tokenizer(), {}) == "hi"


async def test_developers_speak_as_the_system_where_a_template_knows_none(
    templates: Templates,
) -> None:
    chat = [{"role": "developer", "content": "x"}]
    speak(templates={"default": "{{ messages[0].role }}"})
    assert await templates.render(chat, tokenizer(), {}) == "system"
    speak(templates={"default": "{{ messages[0].role }}{# developer #}"})
    assert await templates.render(chat, tokenizer(), {}) == "developer"


async def test_a_refusal_is_the_templates_own_words(templates: Templates) -> None:
    speak(templates={"default": "{{ raise_exception('roles must alternate') }}"})
    with pytest.raises(TemplateFault, match="roles must alternate"):
        await templates.render(HELLO, tokenizer(), {})


async def test_the_bases_own_template_stays_with_the_base(templates: Templates) -> None:
    base = tokenizer(SHOUT, bos_token="<s>", pad_token="</s>")
    speak(templates={"default": SHOUT}, tokens={"bos_token": "<s>"})
    assert await templates.render(HELLO, base, {"chat_template": None}) is None
    assert await templates.render(HELLO, base, {"chat_template": "the operator's"}) is not None
    speak(templates={"default": SHOUT}, tokens={"bos_token": "<!>"})
    assert await templates.render(HELLO, base, {"chat_template": None}) == "<!>user:HI;"


async def test_nobody_waits_for_a_template_that_spins(templates: Templates) -> None:
    spin = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    speak(templates={"default": "quick"})
    await asyncio.gather(*(templates.render(HELLO, tokenizer(), {}) for _ in range(2)))  # started
    speak(templates={"default": spin})
    spinning = asyncio.create_task(templates.render(HELLO, tokenizer(), {}))
    speak(templates={"default": "quick"})
    assert await templates.render(HELLO, tokenizer(), {}) == "quick"
    assert not spinning.done(), "it held up the loop, or the other chat"
    with pytest.raises(TemplateFault, match="more than 2 s"):
        await spinning
