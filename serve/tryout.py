"""A version used once, as a request would use it, before anybody's request does.

What an adapter brings goes behind vLLM's own checks of a request: its engine checks some of it
again where a fault ends the engine. So one chat is written by its template, one request gets its
defaults and stops, passes vLLM's checks, and is packed and unpacked as the engine does it. Nothing
is generated.
"""

from __future__ import annotations

import asyncio
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from serve import voices
from serve.adapters.pool import Version
from serve.errors import AdapterRefused
from serve.turn import Turn, current

WORDS = "quantserve asks"
CHATS = (
    [{"role": "user", "content": WORDS}],
    [{"role": "system", "content": WORDS}, {"role": "user", "content": WORDS}],
)


class Tryout:
    """Of one server: its client to the engine, and what writes its chats."""

    def __init__(self, client: Any, chats: Any) -> None:
        self._client, self._chats = client, chats
        self._defaults = voices.Defaults(client.model_config.get_diff_sampling_param())

    async def of(self, version: Version) -> None:
        """AdapterRefused for a version with which every request would fail, or the engine end."""
        own = asyncio.create_task(self._requests(version))  # in a context of its own
        fault = (await asyncio.gather(own, return_exceptions=True))[0]
        if isinstance(fault, AdapterRefused):
            raise fault
        if isinstance(fault, BaseException):
            told = str(fault) or type(fault).__name__
            raise AdapterRefused(
                f"{version.name} would fail every request: {told}", param="generation_config.json"
            ) from fault

    async def _requests(self, version: Version) -> None:
        current.set(Turn(alias=version.alias, version=version))
        prompt = {"type": "token", "prompt_token_ids": [0]}
        if version.stored.voice.templates:
            prompt = await self._chat(version)
        room = self._client.model_config.max_model_len - version.stored.virtual_tokens
        length = len(prompt["prompt_token_ids"])
        if not 0 < length < room:
            raise AdapterRefused(
                f"{version.name}: a short chat is {length} tokens long, and there is room for "
                f"{max(room, 0)}",
                param="chat_template" if version.stored.voice.templates else "num_virtual_tokens",
            )
        tasks = await self._client.get_supported_tasks()
        if "generate" in tasks:
            self._pack(prompt, tasks)

    async def _chat(self, version: Version) -> dict[str, Any]:
        """The first chat that its template writes."""
        writing = (self._chats.render_chat(_request(messages)) for messages in CHATS)
        outcomes = await asyncio.gather(*writing, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, tuple):
                prompt: dict[str, Any] = outcome[1][0]
                return prompt
        told = outcomes[0]
        error = getattr(told, "error", None)  # an answer instead of an exception
        raise AdapterRefused(
            f"{version.name} writes no chat: {error.message if error else told}",
            param="chat_template",
        )

    def _pack(self, prompt: dict[str, Any], tasks: Any) -> None:
        request = _request(CHATS[0])
        longest = self._defaults.get("max_tokens", 1)
        params = request.to_sampling_params(longest, self._defaults)
        voices.add_stops(params)
        checked = self._client.input_processor.process_inputs("tryout", prompt, params, tasks)
        MsgpackDecoder(EngineCoreRequest).decode(MsgpackEncoder().encode(checked))


def _request(messages: list[dict[str, str]]) -> Any:
    return ChatCompletionRequest.model_validate({"messages": messages})
