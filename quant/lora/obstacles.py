"""What keeps an adapter from being served unmerged, and which path works instead.

An engine adds s B A to the output of a layer and nothing else: no DoRA, no tensors of the base
replaced, no biases. Standard library only.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from quant.lora.lora_config import LoraConfig
from quant.lora.lora_parts import Parts

RANKS = (
    16,
    32,
    64,
    128,
    256,
    320,
    512,
)  # what vLLM lets a server be started with, from its default


def served_rank(rank: int) -> int | None:
    """The --max-lora-rank that serves such a rank; None where none does."""
    return next((limit for limit in RANKS if limit >= rank), None)


class Obstacle(NamedTuple):
    """`remedy` is the command that makes the adapter usable: `adapter merge`, `adapter export`."""

    field: str
    reason: str
    remedy: Literal["merge", "export"]


def to_serving(config: LoraConfig, parts: Parts) -> list[Obstacle]:
    """The obstacles between an adapter and a hot swap, those that export removes last."""
    merging = (
        ("use_dora", config.use_dora, "DoRA rescales whole rows of the base weight"),
        ("modules_to_save", bool(parts.whole), _replaced(parts)),
        (
            "trainable_token_indices",
            bool(parts.rows or config.trainable_token_indices),
            "it replaces rows of the embedding",
        ),
        ("lora_bias", config.lora_bias or bool(parts.offsets), "it adds to the base's biases"),
        ("bias", config.bias != "none", "the base's biases were trained with it"),
        (
            "target_parameters",
            bool(parts.stacked),
            "it adapts stacks of experts, as transformers keeps them",
        ),
        (
            "target_modules",
            any(pair.embedding for pair in parts.pairs.values()),
            "it adapts the embedding",
        ),
    )
    found = [Obstacle(field, reason, "merge") for field, there, reason in merging if there]
    return found + [Obstacle(field, reason, "export") for field, reason in _told(config, parts)]


def _told(config: LoraConfig, parts: Parts) -> Iterator[tuple[str, str]]:
    """The field, and why an engine would take the file for something else, or hang on it."""
    if config.start is not None:
        reason = f"training started from {config.start!r}, which changed the base weights"
        yield "init_lora_weights", reason
    if config.target_parameters and not parts.stacked:
        yield (
            "target_parameters",
            "its router is a target parameter, which an engine knows as a module",
        )
    if config.endless is not None:
        yield config.endless, "vLLM would search for ever with one of its patterns"
    if parts.foreign is not None:
        yield parts.foreign, f"its keys are not as PEFT writes them ({parts.foreign})"
    if parts.copies:
        first = min(parts.copies)
        reason = f"it carries a copy of the base's {first} ({parts.copies[first]})"
        yield parts.copies[first], reason


def _replaced(parts: Parts) -> str:
    names = sorted(parts.whole)
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"it replaces whole tensors of the base: {', '.join(names[:2])}{more}"
