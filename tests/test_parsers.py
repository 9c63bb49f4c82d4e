"""What is picked for whom: excerpts of templates, written as the families write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serve import parsers
from serve.errors import SettingsError
from serve.settings import Settings

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_tools(how: str) -> str:
    """A template that lists the tools and says `how` to call them."""
    listed = "{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    return "{% if tools %}" + listed + "{% raw %}" + how + "{% endraw %}{% endif %}" + CHAT


HERMES = with_tools(
    'Answer with <tool_call>\n{"name": <function-name>, "arguments": <an-object>}\n</tool_call>'
)
CODER = with_tools(
    "<tool_call>\n<function=a_name>\n<parameter=a_key>\na value\n</parameter>\n</function>\n"
    "</tool_call> with arguments"
)
LLAMA = with_tools('{"name": function name, "parameters": dictionary of argument name and value}')
MISTRAL = with_tools("[AVAILABLE_TOOLS] ... [TOOL_CALLS]")
DEEPSEEK = with_tools("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>name<｜tool▁sep｜>arguments")
DEEPSEEK_TOKENS = ["<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>",
                   "<｜tool▁call▁end｜>"]  # fmt: skip
GLM = with_tools("<tool_call>{name}\n<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>")
GRANITE = with_tools("<|start_of_role|> respond with <|tool_call|> and a list of arguments")
THINKING = CHAT.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
# As Qwen's: thoughts unless they are switched off, and a place for them before every answer.
HYBRID = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
# Thoughts of the past are cut out, and nothing asks for new ones.
FORGETFUL = "{% if '</think>' in messages[-1].content %}<think>{% endif %}" + CHAT


def folder(
    where: Path, template: str | None, kind: str = "llama", tokens: list[str] | None = None
) -> Path:
    """A model's folder, as much as is read of it."""
    where.mkdir(parents=True)
    (where / "config.json").write_text(json.dumps({"model_type": kind}))
    (where / "tokenizer.json").write_text(json.dumps({"added": tokens or []}))
    if template is not None:
        (where / "chat_template.jinja").write_text(template)
    return where


def chosen(made: Path, *flags: str, **settings: str) -> parsers.Parsers:
    return parsers.choose(Settings(artifact=made, vllm_flags=flags, **settings))


@pytest.mark.parametrize(
    ("template", "kind", "tokens", "expected"),
    [
        (HERMES, "qwen2", [], "hermes"),
        (HERMES, "smollm3", [], "hermes"),
        (CODER, "qwen3_moe", [], "qwen3_coder"),
        (CODER, "nemotron_h", [], "qwen3_coder"),
        (CODER, "step3p5", [], "step3p5"),
        (LLAMA, "llama", ["<|python_tag|>"], "llama3_json"),
        (MISTRAL, "mistral", ["[TOOL_CALLS]"], "mistral"),
        (DEEPSEEK, "deepseek_v3", DEEPSEEK_TOKENS, "deepseek_v31"),
        (DEEPSEEK.replace("arguments", "```json"), "deepseek_v3", DEEPSEEK_TOKENS, "deepseek_v3"),
        (GLM, "glm4_moe", [], "glm45"),
        (GRANITE, "granite", [], "granite"),
        (with_tools("<|python_start|><|header_start|> [func_name1(a=1)]"), "llama4", [],
         "llama4_pythonic"),
        (with_tools("<tool_calls>"), "jamba", ["<tool_calls>", "</tool_calls>"], "jamba"),
        (with_tools("<tool_calls>"), "hunyuan_v1_moe", [], "hunyuan_a13b"),
        ("", "gpt_oss", [], "openai"),
        ("", "deepseek_v32", [], "deepseek_v32"),
    ],
)  # fmt: skip
def test_the_template_decides(
    tmp_path: Path, template: str, kind: str, tokens: list[str], expected: str
) -> None:
    found = chosen(folder(tmp_path / "m", template, kind, tokens))
    assert found.tools.name == expected and found.written
    added = parsers.flags(found, ())
    assert added[:3] == ["--enable-auto-tool-choice", "--tool-call-parser", expected]


@pytest.mark.parametrize(
    ("template", "kind", "reason"),
    [
        (CHAT, "llama", "writes no tools"),
        (None, "llama", "no chat template"),
        (CHAT + "{# <tool_call> arguments #}", "qwen2", "writes no tools"),  # of a distilled model
        (with_tools("<TOOLCALL>[...]</TOOLCALL>"), "llama", "none is known"),
        (with_tools("<arg_key><arg_value>"), "llama", "none is known"),  # five families share these
        (LLAMA, "llama", "lacks <|python_tag|>"),  # vLLM would end the start
    ],
)
def test_where_none_is_known_the_reason_is(
    tmp_path: Path, template: str | None, kind: str, reason: str
) -> None:
    found = chosen(folder(tmp_path / "m", template, kind))
    assert found.tools.name is None and reason in found.tools.why
    assert parsers.flags(found, ()) == []


def test_the_start_says_what_was_picked_and_by_what(tmp_path: Path) -> None:
    told = chosen(folder(tmp_path / "m", HERMES, "qwen2")).told()
    assert told == [
        "tool parser: hermes (the chat template writes <tool_call> and arguments)",
        "reasoning parser: none (the chat template knows no thoughts)",
    ]
    silent = chosen(folder(tmp_path / "n", CHAT), tool_parser="hermes").told()
    assert silent[0] == "tool parser: hermes (--tool-parser)"
    assert silent[1].startswith("the chat template writes no tools")


@pytest.mark.parametrize(
    ("template", "kind", "expected"),
    [
        (THINKING, "qwen2", "deepseek_r1"),
        (THINKING, "qwen3", "qwen3"),
        (HYBRID, "qwen3", "qwen3"),
        (THINKING, "minimax_m2", "minimax_m2"),
        (FORGETFUL, "qwen3", None),
        (CHAT, "qwen3", None),
        (HYBRID.replace("enable_thinking", "something_else"), "qwen3", None),
        ("", "gpt_oss", "openai_gptoss"),
    ],
)
def test_only_a_template_that_makes_the_model_think_gets_a_reasoning_parser(
    tmp_path: Path, template: str, kind: str, expected: str | None
) -> None:
    found = chosen(folder(tmp_path / "m", template, kind, ["<think>", "</think>"]))
    assert found.reasoning.name == expected


def test_a_template_that_can_show_thoughts_says_how_to_take_them_out(tmp_path: Path) -> None:
    found = chosen(folder(tmp_path / "m", FORGETFUL, "qwen3"))
    assert "--reasoning-parser qwen3" in found.reasoning.why


def test_options_override_and_refuse_what_vllm_does_not_know(tmp_path: Path) -> None:
    made = folder(tmp_path / "m", HERMES, "qwen2")
    assert chosen(made, tool_parser="none").tools.name is None
    assert chosen(made, tool_parser="xlam").tools.name == "xlam"
    assert chosen(made, reasoning_parser="qwen3").reasoning.name == "qwen3"
    with pytest.raises(SettingsError, match=r"'hermess' is no tool parser .* such as hermes"):
        chosen(made, tool_parser="hermess")
    plugged = chosen(made, "--tool-parser-plugin", "mine.py", tool_parser="mine")
    assert plugged.tools.name == "mine"


@pytest.mark.parametrize(
    ("given", "added"),
    [
        (("--tool-call-parser", "xlam"), ["--enable-auto-tool-choice"]),
        (("--tool_call_parser=xlam", "--enable-auto-tool-choice"), []),
        (("--enable-auto-tool-choice",), ["--tool-call-parser", "hermes"]),
        (("--no-enable-auto-tool-choice",), []),
        (("--no-enable-auto-tool-choice", "--tool-call-parser", "xlam"), []),
    ],
)
def test_vllms_own_flags_win_and_are_not_doubled(
    tmp_path: Path, given: tuple[str, ...], added: list[str]
) -> None:
    found = chosen(folder(tmp_path / "m", HERMES, "qwen2"), *given, tool_parser="auto")
    assert parsers.flags(found, given) == added


def test_a_template_given_by_flag_goes_before_the_folders(tmp_path: Path) -> None:
    made = folder(tmp_path / "m", CHAT, "qwen2")
    (tmp_path / "own.jinja").write_text(CODER)
    assert chosen(made, "--chat-template", str(tmp_path / "own.jinja")).tools.name == "qwen3_coder"
    assert chosen(made, f"--chat-template={HERMES}").tools.name == "hermes"


def test_every_place_of_a_template_is_looked_at(tmp_path: Path) -> None:
    one = folder(tmp_path / "one", None, "qwen2")
    (one / "tokenizer_config.json").write_text(json.dumps({"chat_template": HERMES}))
    two = folder(tmp_path / "two", None, "qwen2")
    named = [{"name": "default", "template": CHAT}, {"name": "tool_use", "template": HERMES}]
    (two / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    three = folder(tmp_path / "three", CHAT, "qwen2")
    (three / "additional_chat_templates").mkdir()
    (three / "additional_chat_templates" / "tool_use.jinja").write_text(HERMES)
    four = folder(tmp_path / "four", None, "qwen2")
    (four / "chat_template.json").write_text(json.dumps({"chat_template": HERMES}))
    assert [chosen(made).tools.name for made in (one, two, three, four)] == ["hermes"] * 4


@pytest.mark.parametrize(
    "template",
    ["{% for x in range(10**9) %}{% endfor %}", "{{ nothing.at.all }}", "{% if %}",
     "{{ raise_exception('roles must alternate') }}"],
)  # fmt: skip
def test_a_template_that_breaks_does_not_break_the_start(tmp_path: Path, template: str) -> None:
    found = chosen(folder(tmp_path / "m", f"{template} <tool_call> arguments tools", "qwen2"))
    assert found.tools.name == "hermes", "what cannot be rendered is believed"
    assert chosen(folder(tmp_path / "n", template, "qwen2")).tools.name is None


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "chat_template.json"])
def test_damaged_files_are_left_to_vllm(tmp_path: Path, name: str) -> None:
    made = folder(tmp_path / "m", HERMES, "qwen2")
    for damage in (b"\xff\xfe", b"[1]", b"{", b'{"chat_template": 7, "model_type": null}'):
        (made / name).write_bytes(damage)
        assert chosen(made).tools.name == "hermes"


def test_a_versions_own_template_is_known_by_its_form() -> None:
    assert parsers.form_of(HERMES, "llama") == "hermes"
    assert parsers.form_of(LLAMA, "llama") == "llama3_json"
    assert parsers.form_of(CHAT, "llama") is None
