"""The kinds of adapter that PEFT trains, and what to do with those that are not meant here.

Names are those of PEFT 0.21's PeftType.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quant.errors import AdapterError

SOFT_PROMPTS = ("PROMPT_TUNING", "P_TUNING")
_CACHED = (
    "it puts keys and values of its own into every layer's cache, for which vLLM has no door;"
    " train prompt tuning, p-tuning or a LoRA instead"
)
_REASONS = {
    "LORA": "it is a LoRA",
    **dict.fromkeys(
        SOFT_PROMPTS,
        "virtual tokens in front of a prompt are no change of any weight; they are served as they"
        " are (`quantserve serve --adapter`)",
    ),
    "PREFIX_TUNING": _CACHED,
    "CARTRIDGE": _CACHED,
    "MULTITASK_PROMPT_TUNING": "its prompt depends on a task, which no request names",
    "ADAPTION_PROMPT": "it adds attention of its own to the layers; train a LoRA instead",
}
_MERGEABLE = (
    "only LoRA, prompt tuning and p-tuning are known here; PEFT's merge_and_unload() makes a plain"
    " model of it, which `quantserve quantize` takes"
)


def check(path: Path, raw: Mapping[str, Any], *meant: str) -> None:
    """AdapterError for an adapter_config.json at `path` of another kind than the `meant`."""
    kind = raw.get("peft_type")
    if kind not in meant:
        reason = _REASONS.get(str(kind), _MERGEABLE)
        raise AdapterError(
            f"{path}: peft_type {kind!r}: {reason}",
            field="peft_type",
            expected=" or ".join(meant),
            found=repr(kind)[:100],
        )
