"""What a checkpoint calls the tensors that a model's own code has other names for.

transformers renamed modules over the years (Mixtral's `block_sparse_moe` is `mlp` now) and keeps
all experts of a block in two fused tensors, while checkpoints go on with the old names and a tensor
for each expert. Its own loader's tables say which is which; they are read here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from quant.errors import SourceError

Shape = tuple[int, ...]


class Leaves(NamedTuple):
    """An expert's three linear layers, by the last part of their names in a checkpoint."""

    gate: str
    up: str
    down: str


class Part(NamedTuple):
    """Rows [first, first + shape[0]) of a tensor whose dimensions but the last count as one."""

    of: str
    first: int
    shape: Shape


def own_names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """The model's own name of each tensor of a checkpoint; experts are told apart in both."""
    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    return {name: rename_source_key(name, renamings, [])[0] for name in stored}


def expert_leaves(model: PreTrainedModel) -> Leaves | None:
    """None where checkpoints of this model have no tensor for each expert."""
    found: dict[str, list[str]] = {}
    for change in get_model_conversion_mapping(model):
        if isinstance(change, WeightConverter) and len(change.target_patterns) == 1:
            place, _, fused = change.target_patterns[0].rpartition(".")
            if place.endswith("experts"):
                found[fused] = [
                    name.split(".")[-2] for name in change.source_patterns if ".*." in name
                ]
    gate_up, down = found.get("gate_up_proj", []), found.get("down_proj", [])
    return Leaves(*gate_up, *down) if (len(gate_up), len(down)) == (2, 1) else None


def expert_parts(model: PreTrainedModel) -> dict[str, Part]:
    """`published` of the model's fused experts; empty where it has none."""
    if expert_leaves(model) is None:
        return {}
    weights = model.named_parameters()
    return published(model, {name: tuple(w.shape) for name, w in weights if w.ndim == 3})


def published(model: PreTrainedModel, own: Mapping[str, Shape]) -> dict[str, Part]:
    """By the name that checkpoints have for it, each part of tensors named as the model has them.

    transformers' own way back is shown the number of each row instead of the row. SourceError
    where it mixes rows. `model` is one that nobody loads weights into.
    """
    changes = get_model_conversion_mapping(model, add_legacy=False)
    # What it would look up again for every tensor; a prefix is there or not, as `own` has it.
    model._weight_conversions = [c for c in changes if not isinstance(c, PrefixChange)]
    found: dict[str, Part] = {}
    for name, shape in own.items():
        rows = torch.arange(math.prod(shape[:-1]), dtype=torch.int32).view(*shape[:-1], 1)
        for theirs, part in revert_weight_conversion(model, {name: rows}).items():
            numbers = part.flatten()
            first, count = int(numbers[0]), len(numbers)
            if not torch.equal(numbers, torch.arange(first, first + count, dtype=torch.int32)):
                raise SourceError(f"{name} is stored in a way that is not taken apart")
            found[theirs] = Part(name, first, shape if len(shape) < 3 else (count, shape[-1]))
    return found
