"""Chat templates as model families write them, and conversations as clients send them.

A table to hold our rendering to vLLM's: every conversation through every template.
"""

from __future__ import annotations

import json
from typing import Any

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """\
{{- bos_token }}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|im_start|>system\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message + "<|im_end|>" }}
{%- if tools_in_user_message and not tools is none %}
    {%- set first_user_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
    {{- '<|im_start|>user\\n\\n' }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
    {{- first_user_message + "<|im_end|>"}}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|im_start|>' + message['role'] + '\\n\\n'+ message['content'] | trim + '<|im_end|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|im_start|>assistant\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}<|im_end|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|im_start|>ipython\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|im_end|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n\\n' }}
{%- endif %}
"""
QWEN3 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}
                    {{- '\\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\\n{"name": "' }}
                {{- tool_call.name }}
                {{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""  # noqa: E501
MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.function.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}
            {%- endfor %}
            {{- "][/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {{- tool_call.function|tojson + ', "id": "' + tool_call.id + '"}' }}
        {%- endfor %}
        {{- "]" + eos_token }}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token}}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}
"""  # noqa: E501
GEMMA3 = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<|im_start|>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<|im_start|>model\\n'}}
{%- endif -%}
"""
PARTS = (
    "{% for message in messages %}{{ message.role }}: {% for part in message['content'] %}"
    "{% if part.type == 'text' %}{{ part.text }}|{% else %}<{{ part }}>{% endif %}{% endfor %}"
    "{{ message.get('tool_calls', '') }}{{ message.get('tool_call_id', '') }}\n{% endfor %}"
)
# Contents reach the loop through a macro's parameter, as in Qwen2-VL's and GLM-4.5's.
MACRO = (
    "{% macro visible(content) %}{% if content is string %}{{ content }}{% else %}"
    "{% for item in content %}{{ item.text if item is mapping else item }}~{% endfor %}{% endif %}"
    "{% endmacro %}"
    "{% for m in messages %}[{{ m.role }}{{ ' ' + m.name if m.name }}] {{ visible(m.content) }}"
    "{% if m.reasoning %} ({{ m.reasoning }}){% endif %}\n{% endfor %}"
)
DOCUMENTS = (
    "{% for d in documents or [] %}{{ d.title }}: {{ d.text }}\n{% endfor %}"
    "{% for m in messages %}{{ m | tojson }}\n{% endfor %}"
    "{% if tools is defined and tools is not none %}{{ tools | tojson }}{% endif %}"
    "{% if strict %}strict{% endif %}"
)
DEVELOPERS = (
    "{% for m in messages %}{{ 'developer' if m.role == 'developer' }}{{ m }}\n{% endfor %}"
)
TEMPLATES = {
    "chatml": CHATML, "llama3": LLAMA3, "qwen3": QWEN3, "mistral": MISTRAL, "gemma3": GEMMA3,
    "parts": PARTS, "macro": MACRO, "documents": DOCUMENTS, "developers": DEVELOPERS,
}  # fmt: skip

_WEATHER = {
    "type": "object",
    "required": ["city"],
    "properties": {"city": {"type": "string", "description": "one"}, "days": {"type": "integer"}},
}
TOOLS = [
    {"function": {"parameters": _WEATHER, "name": "weather", "description": "Of a city."},
     "type": "function"},
    {"type": "function", "function": {"name": "now", "strict": True}},
]  # fmt: skip


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def call(arguments: str, name: str = "weather", number: int = 1) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call0000{number}", "type": "function", "function": function}


_ASK, _ANSWER = said("user", "what is the capital?"), said("assistant", "the capital is paris")
_CALLS = said("assistant", None, tool_calls=[call('{"city": "Paris", "days": 2}')])
_RESULT = said("tool", "it is sunny", tool_call_id="call00001")
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [said("system", "be brief"), _ASK, _ANSWER]},
    "spaces": {"messages": [said("user", "  what? \n"), said("assistant", " this. ")]},
    "many turns": {"messages": [_ASK, _ANSWER, _ASK, _ANSWER]},
    "tools": {"messages": [_ASK, _ANSWER], "tools": TOOLS},
    "a call": {"messages": [_ASK, _CALLS, _RESULT, _ANSWER], "tools": TOOLS},
    "two calls": {"messages": [_ASK, said("assistant", "both", tool_calls=[
        call('{"city": "Rome"}'), call("", "now", 2)]), _RESULT, _RESULT, _ANSWER]},
    "broken arguments": {"messages": [_ASK, said("assistant", "", tool_calls=[call("{never")])]},
    "listed arguments": {"messages": [_ASK, said("assistant", "", tool_calls=[call("[1]")])]},
    "no calls": {"messages": [_ASK, said("assistant", "none", tool_calls=[])]},
    "parts": {"messages": [said("system", parts("be", "brief")), said("user", parts("what", "is")),
                           said("assistant", parts("a fox"))]},
    "no parts": {"messages": [said("user", []), _ANSWER]},
    "a tool's parts": {"messages": [_ASK, _CALLS, _RESULT | {"content": parts("sun", "wind")}]},
    "refusal": {"messages": [_ASK, said("assistant", [{"type": "refusal", "refusal": "no"}])]},
    "thoughts": {"messages": [_ASK, _ANSWER | {"reasoning_content": "which country?"}]},
    "old thoughts": {"messages": [_ASK, _ANSWER | {"reasoning": "which?"}, _ASK, _ANSWER]},
    "thoughts inside": {"messages": [_ASK, said("assistant", "<think>\nhm\n</think>\n\nparis")]},
    "names": {"messages": [_ASK | {"name": "ann"}, _ANSWER | {"name": "bob"}]},
    "strangers' keys": {"messages": [_ASK | {"id": 7}, _ANSWER | {"score": 1.5, "weight": 0}]},
    "developer": {"messages": [said("developer", "be brief"), _ASK, _ANSWER]},
    "late developer": {"messages": [said("system", parts("one", "two")), _ASK, _ANSWER,
                                    said("developer", "be brief"), _ASK, _ANSWER]},
    "billing": {"messages": [said("system", "x-anthropic-billing-header: cch=1\nbe brief"), _ASK]},
    "variables": {"messages": [_ASK, _ANSWER], "chat_template_kwargs": {
        "enable_thinking": False, "strict": True, "date_string": "1 Jan 2030", "unknown": [1],
        "tools_in_user_message": None}},
    "documents": {"messages": [_ASK, _ANSWER],
                  "documents": [{"title": "France", "text": "paris is a city"}]},
}  # fmt: skip


def request(name: str) -> dict[str, Any]:
    """A copy of one, which vLLM may change."""
    copy: dict[str, Any] = json.loads(json.dumps(CONVERSATIONS[name]))
    return copy
