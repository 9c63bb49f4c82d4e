"""How models write calls of tools and thoughts, and which of vLLM's parsers reads each form.

Names stand in the registries of every vLLM that is supported. A form that is not listed is named by
the operator (--tool-parser, --reasoning-parser).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Form:
    """How some models write: `marks` stand in the template, all of them.

    `families` are beginnings of model types, any of which will do; `tokens` are those that the
    parser does not start without.
    """

    parser: str
    marks: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()


DEEPSEEK = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>",
            "<｜tool▁call▁end｜>")  # fmt: skip
# The first that fits is taken: the narrower of two forms stands before the wider.
TOOLS = (
    Form("openai", families=("gpt_oss",)),
    Form("deepseek_v4", families=("deepseek_v4",)),
    Form("deepseek_v32", families=("deepseek_v32",)),
    Form("gemma4", ("<|tool_call>",)),
    Form("functiongemma", ("<start_function_call>",)),
    Form("kimi_k2", ("<|tool_calls_section_begin|>",)),
    Form("kimi_k3", ("<|open|>", "<|sep|>"), families=("kimi_k3",)),
    Form("minimax_m3", ("]<]minimax[>[",)),
    Form("minimax_m2", ("<minimax:tool_call>",)),
    Form("longcat", ("<longcat_tool_call>",)),
    Form(
        "lfm2", ("<|tool_call_start|>",), tokens=("<|tool_call_start|>", "<|tool_call_end|>")
    ),
    Form("deepseek_v3", (DEEPSEEK[0], "```json"), tokens=DEEPSEEK),
    Form("deepseek_v31", DEEPSEEK[:1], tokens=DEEPSEEK),
    Form("step3", ("<｜tool_calls_begin｜>",)),
    Form("apertus", ("<|tools_prefix|>",)),
    Form("plamo3", ("<|plamo:begin_tool_requests:plamo|>",)),
    Form("k2_horizon", ("<ifm|tool_calls>",)),
    Form("muse_glimmer", ("<atem:function_calls>",)),
    Form("dots", ("<dots_function_call>",)),
    Form("inkling", ("<|content_invoke_tool_json|>",)),
    Form("cohere_command3", ("<|START_ACTION|>",)),
    Form("seed_oss", ("<seed:tool_call>",)),
    Form("gigachat3", ("<|role_sep|>", "function call")),
    Form("internlm", ("<|action_start|>", "<|plugin|>")),
    Form("glm45", ("<arg_key>", "<arg_value>"), families=("glm",)),
    Form("ling3", ("<arg_key>", "<arg_value>"), families=("bailing",)),
    Form("poolside_v1", ("<arg_key>", "<arg_value>"), families=("laguna",)),
    Form("step3p5", ("<function=", "<parameter="), families=("step3p",)),
    Form("mimo", ("<function=", "<parameter="), families=("mimo",)),
    Form("qwen3_coder", ("<tool_call>", "<function=", "<parameter=")),
    Form("minicpm5", ("<function name=", "<param name=")),
    Form("granite-20b-fc", ("<|function_call_library|>",)),
    Form("granite", ("<|tool_call|>", "<|start_of_role|>")),
    Form("granite4", ("</tool_call>", "<|start_of_role|>")),
    Form("mistral", ("[TOOL_CALLS]",), tokens=("[TOOL_CALLS]",)),
    Form("jamba", ("<tool_calls>",), ("jamba",), tokens=("<tool_calls>", "</tool_calls>")),
    Form("hunyuan_a13b", ("<tool_calls>",), families=("hunyuan",)),
    Form("phi4_mini_json", ("functools[",)),
    Form("olmo3", ("<function_calls>", "<functions>")),
    Form("xlam", ("calls in a single JSON array",)),
    Form("ernie45", ("<tool_call>",), families=("ernie4_5",)),
    Form("llama4_pythonic", ("func_name1(", "<|header_start|>")),
    Form("pythonic", ("func_name1(",)),
    Form("llama4_json", ('"parameters": dictionary', "<|header_start|>"),
         tokens=("<|python_tag|>",)),
    Form("llama3_json", ('"parameters": dictionary',), tokens=("<|python_tag|>",)),
    Form("hermes", ("<tool_call>", "arguments")),
)  # fmt: skip
THINK = ("<think>", "</think>")
# The first mark is what opens a thought.
REASONING = (
    Form("openai_gptoss", families=("gpt_oss",)),
    Form("qwen3", THINK[:1], families=("qwen3",)),
    Form("glm45", THINK[:1], families=("glm",)),
    Form("kimi_k2", THINK[:1], families=("kimi",)),
    Form("minimax_m2", THINK[:1], families=("minimax",)),
    Form("nemotron_v3", THINK[:1], families=("nemotron_h",)),
    Form("step3p5", THINK[:1], families=("step3p",)),
    Form("step3", THINK[:1], families=("step3",), tokens=THINK[1:]),
    Form("mimo", THINK[:1], families=("mimo",)),
    Form("ernie45", THINK[:1], families=("ernie4_5",), tokens=THINK),
    Form("minimax_m3", ("<mm:think>",), tokens=("<mm:think>", "</mm:think>")),
    Form("seed_oss", ("<seed:think>",)),
    Form("deepseek_r1", THINK[:1], tokens=THINK),
)
