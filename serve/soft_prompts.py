"""Virtual tokens in front of prompts: PEFT's prompt tuning and p-tuning, inside the server.

A prompt of token ids becomes one of ids and rows: the rows of the version's virtual tokens, then
the ids, which the engine looks up itself. Clients never send rows. vLLM hashes rows into its prefix
cache block by block, so that versions share nothing they should not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from quant.lora.adapter import WEIGHTS
from quant.lora.soft_prompt import KEY
from serve.adapters.pool import Version
from serve.errors import BadRequest


class SoftPrompts:
    """The rows of loaded versions. `dtype` is the model's, `length` the longest it can read."""

    def __init__(self, dtype: torch.dtype, length: int, check: Callable[[Sequence[int]], None]):
        self._dtype, self._length, self._check = dtype, length, check
        self._rows: dict[str, Tensor] = {}  # [virtual tokens, width] by version name

    async def load(self, version: Version) -> None:
        path = version.stored.folder / WEIGHTS

        def read() -> Tensor:
            with safe_open(path, framework="pt") as file:
                rows: Tensor = file.get_tensor(KEY)
            return rows.to(self._dtype)

        self._rows[version.name] = await asyncio.to_thread(read)

    def unload(self, version: Version) -> None:
        self._rows.pop(version.name, None)

    def prepend(self, version: Version, prompt: Any, params: Any) -> dict[str, Any]:
        """vLLM's input for a prompt of token ids behind the version's rows.

        `params` are shortened to what is left of the context. BadRequest where the prompt is not
        of ids, or its own log probabilities are asked for. `check` raises for ids out of range:
        vLLM does not look at those of a mixed prompt.
        """
        if prompt.get("type") != "token":
            raise BadRequest(f"{version.alias!r} is prompt-tuned and reads text only")
        if params.prompt_logprobs is not None:
            raise BadRequest(
                f"{version.alias!r} is prompt-tuned: its prompts begin with virtual tokens, which "
                "have no log probability; leave out prompt_logprobs, or echo with logprobs",
                param="prompt_logprobs",
            )
        ids = prompt["prompt_token_ids"]
        self._check(ids)
        rows = self._rows[version.name]
        room = self._length - len(rows) - len(ids)
        if params.max_tokens is not None and 0 < room < params.max_tokens:
            params.max_tokens = max(room, params.min_tokens)
        return _mixed(rows, ids) | {k: prompt[k] for k in ("prompt", "cache_salt") if k in prompt}


def _mixed(rows: Tensor, ids: list[int]) -> dict[str, Any]:
    """vLLM's EmbedsInput; where an id counts, its row does not.

    Virtual tokens bear the first id of the prompt: penalties of what is repeated then see the ids
    that the client sent, and no other.
    """
    front = len(rows)
    every = torch.zeros(front + len(ids), rows.shape[1], dtype=rows.dtype)  # [prompt, width]
    every[:front] = rows
    return {
        "type": "embeds",
        "prompt_embeds": every,
        "prompt_token_ids": [ids[0]] * front + ids,
        "is_token_ids": [False] * front + [True] * len(ids),
    }
