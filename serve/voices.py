"""The version's own way of speaking, where vLLM asks for the base's: template, defaults, stops.

Whatever a client leaves out is filled in from the version that its request holds, then from the
base. Templates are rendered apart (quant.lora.cell), a few at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import Any

from quant.lora.cell import Cell
from quant.lora.voice import Voice
from serve.turn import current

CELLS = 2  # chats rendered at once: one that takes its whole time does not stop the others
# How vLLM calls a tokenizer, not what a template reads.
NOT_FOR_TEMPLATES = ("chat_template", "continue_final_message", "return_dict", "tokenize")
SILENT = Voice()


def voice() -> Voice:
    """That of the version which the request at hand holds; an empty one for the base."""
    turn = current.get()
    return turn.version.stored.voice if turn and turn.version else SILENT


class Defaults(dict[str, Any]):
    """vLLM's default sampling parameters, with the version's own before the base's."""

    def __bool__(self) -> bool:
        return True  # `defaults or {}` is asked of an empty one, too

    def get(self, name: str, default: Any = None) -> Any:
        own = voice().defaults
        return own[name] if name in own else super().get(name, default)


def add_stops(params: Any) -> None:
    """Let the version's stop strings and tokens end an answer; `params`: vLLM's SamplingParams."""
    own = voice()
    if own.eos:
        # What vLLM does with a generation config; `ignore_eos` ignores these as well.
        params.update_from_generation_config({"eos_token_id": list(own.eos)}, None)
    if own.stop and not params.stop and params.detokenize:
        params.stop = list(own.stop)
        if not params.include_stop_str_in_output:
            params.output_text_buffer_length = max(map(len, own.stop)) - 1


class Templates:
    """Cells, lent to one rendering each."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(CELLS, "template")
        self._free: SimpleQueue[Cell] = SimpleQueue()

    async def render(
        self, messages: list[Any], tokenizer: Any, asked: Mapping[str, Any]
    ) -> str | None:
        """The chat as the version's template has it; None: it has none, the base's will do.

        `tokenizer` is the base's, `asked` what vLLM calls it with. TemplateFault says why there is
        no chat.
        """
        own, tokens = voice(), tokenizer.special_tokens_map
        template = own.template(tools=bool(asked.get("tools")))
        if template is None or _is_bases(template, own, tokenizer, asked):
            return None
        told = {name: value for name, value in asked.items() if name not in NOT_FOR_TEMPLATES}
        chat = [_as_wanted(message, own, template) for message in messages]
        variables = {"tools": None, "documents": None, "add_generation_prompt": False, **tokens,
                     **own.tokens, **told, "messages": chat}  # fmt: skip
        continues = bool(asked.get("continue_final_message"))
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._threads, self._render, template, variables, continues
        )

    def _render(self, template: str, variables: Mapping[str, Any], continues: bool) -> str:  # noqa: FBT001
        try:
            cell = self._free.get_nowait()
        except Empty:
            cell = Cell()
        try:
            return cell.render(template, variables, continues=continues)
        finally:
            self._free.put(cell)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        while not self._free.empty():
            self._free.get().close()


def _is_bases(template: str, own: Voice, tokenizer: Any, asked: Mapping[str, Any]) -> bool:
    """Whether the base writes the same: trainers save its template with every adapter."""
    same = (asked.get("chat_template") or tokenizer.chat_template) == template
    return same and not set(own.tokens.items()) - set(tokenizer.special_tokens_map.items())


def _as_wanted(message: Mapping[str, Any], own: Voice, template: str) -> dict[str, Any]:
    """A message with its content as the template reads it: vLLM asked the base's template."""
    told, content = dict(message), message.get("content")
    if told.get("role") == "developer" and "developer" not in template:
        told["role"] = "system"
    if own.lists and isinstance(content, str):
        told["content"] = [{"type": "text", "text": content}]
    elif not own.lists and isinstance(content, list):
        parts = [part.get("text", "") if isinstance(part, dict) else part for part in content]
        told["content"] = "\n".join(parts)
    return told
