"""What a checkpoint calls the tensors that a model's own code has other names for.

transformers renamed modules over the years (Mixtral's `block_sparse_moe` is `mlp` now) and keeps
all experts of a block in two fused tensors, while checkpoints go on with the old names and a tensor
for each expert. Its own loader's tables say which is which; they are read here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


class Leaves(NamedTuple):
    """An expert's three linear layers, by the last part of their names in a checkpoint."""

    gate: str
    up: str
    down: str


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
