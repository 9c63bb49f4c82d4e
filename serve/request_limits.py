"""What one request may ask of the engine: a table of limits, held against vLLM's parsed request.

Called before the model is looked up. Log probabilities, context length and the like are not here:
vLLM bounds those itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve import json_limits
from serve.errors import BadRequest
from serve.settings import LONGEST_ALIAS, Settings

INT32, INT64 = 2**31, 2**63
LONG_INTEGERS = ("seed", "priority", "truncate_prompt_tokens")
# field -> its elements are strings whose length counts, too
LISTS = {"stop": True, "bad_words": True, "stop_token_ids": False, "logit_bias": False,
         "allowed_token_ids": False, "tools": False}  # fmt: skip
PROMPTS = ("prompt", "input", "texts", "inputs", "documents", "text_2", "data_2", "messages")
NAMES = ("user", "request_id", "session_id", "prompt_cache_key",
         "previous_response_id")  # fmt: skip
RESERVED = ("conversation", "messages", "tools", "tokenizer", "config", "self")


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Counts, and lengths in characters."""

    model: int = LONGEST_ALIAS + 65  # and a version's digest
    name: int = 512  # of users, sessions, salts
    messages: int = 4096
    n: int = 128
    beams: int = 16
    sequences: int = 2048  # prompts of a batch, times n
    stop: int = 64
    bad_words: int = 256
    word: int = 1024  # characters of a stop string or a bad word
    stop_token_ids: int = 1024
    logit_bias: int = 1024
    allowed_token_ids: int = 65_536
    tools: int = 256


def limits_of(settings: Settings) -> RequestLimits:
    return RequestLimits(
        messages=settings.max_messages, n=settings.max_n, sequences=settings.max_sequences
    )


def check(asked: Mapping[str, Any], limits: RequestLimits) -> None:
    """BadRequest, with the field and the number allowed, for the first that is over its limit."""
    _check_length(asked, "model", limits.model)
    for name in NAMES:
        _check_length(asked, name, limits.name)
    for name, value in asked.items():
        most = INT64 if name in LONG_INTEGERS else INT32
        if isinstance(value, int | float) and not -most <= value < most:
            raise BadRequest(f"{name} is {value:g}, which is out of range", param=name)
    for name, holds_text in LISTS.items():
        _check_list(asked, name, getattr(limits, name), limits.word if holds_text else None)
    _check_sequences(asked, limits)
    _check_template(asked.get("chat_template_kwargs"))
    for name in ("messages", "input"):
        _check_calls(asked.get(name), name)


def _check_template(variables: Any) -> None:
    """vLLM hands them on beside arguments of its own, which are no template's."""
    for name in RESERVED if isinstance(variables, dict) else ():
        if name in variables:
            raise BadRequest(
                f"chat_template_kwargs has {name}, which the server gives; use another name",
                param="chat_template_kwargs",
            )


def _check_calls(turns: Any, param: str) -> None:
    """Arguments of earlier calls are JSON in a string, which vLLM parses without a limit."""
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, list):
            _check_calls(turn, param)
            continue
        calls = _part(turn, "tool_calls")
        for call in (turn, *(calls if isinstance(calls, list) else ())):
            arguments = _part(_part(call, "function") or call, "arguments")
            if isinstance(arguments, str):
                try:
                    json_limits.check_text(arguments)
                except BadRequest as fault:
                    raise BadRequest(f"the arguments of a call: {fault}", param=param) from fault


def _part(whole: Any, name: str) -> Any:
    return whole.get(name) if isinstance(whole, dict) else getattr(whole, name, None)


def _check_length(asked: Mapping[str, Any], name: str, most: int) -> None:
    value = asked.get(name)
    if isinstance(value, str) and len(value) > most:
        raise BadRequest(f"{name} has {len(value)} characters; at most {most}", param=name)


def _check_list(asked: Mapping[str, Any], name: str, most: int, word: int | None) -> None:
    value = asked.get(name)
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list | dict):
        return
    if len(values) > most:
        raise BadRequest(f"{name} has {len(values)} entries; at most {most}", param=name)
    if word is not None and any(isinstance(v, str) and len(v) > word for v in values):
        raise BadRequest(f"{name}: an entry has more than {word} characters", param=name)


def _check_sequences(asked: Mapping[str, Any], limits: RequestLimits) -> None:
    """How many sequences the engine would work on at once."""
    wanted = max(_number(asked, "n"), _number(asked, "best_of"))
    beams = bool(asked.get("use_beam_search"))
    most = limits.beams if beams else limits.n
    if wanted > most:
        setting = "" if beams else " (QUANTSERVE_MAX_N)"
        name = "n" if _number(asked, "n") == wanted else "best_of"
        raise BadRequest(f"{name} is {wanted}; at most {most}{setting}", param=name)
    for name in PROMPTS:
        prompts, each = _batch(name, asked.get(name))
        if each > limits.messages:
            raise BadRequest(
                f"{name} has {each} entries; at most {limits.messages} (QUANTSERVE_MAX_MESSAGES)",
                param=name,
            )
        if prompts * wanted > limits.sequences:
            raise BadRequest(
                f"{prompts * wanted} sequences in one request, {prompts} prompts of n {wanted}; at "
                f"most {limits.sequences} (QUANTSERVE_MAX_SEQUENCES)",
                param=name,
            )


def _number(asked: Mapping[str, Any], name: str) -> int:
    value = asked.get(name)
    return value if isinstance(value, int) and value > 0 else 1


def _batch(name: str, value: Any) -> tuple[int, int]:
    """Prompts in a field, and messages in the longest conversation of it."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        return 1, 0
    first = value[0]
    if isinstance(first, int):
        return 1, 0  # the tokens of one prompt
    if name == "messages" and isinstance(first, list):  # a batch of conversations
        return len(value), max(map(len, value))
    if name == "messages" or (name == "input" and not isinstance(first, str | list)):
        return 1, len(value)  # one conversation, of chat or of responses
    return len(value), 0
