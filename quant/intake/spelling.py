"""What a checkpoint calls the tensors that a model's own code has other names for.

transformers renamed modules over the years (Mixtral's `block_sparse_moe` is `mlp` now) and keeps
all experts of a block in two fused tensors, while checkpoints go on with the old names and a tensor
for each expert. Its own loader's tables say which is which; they are read here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
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


class Key(NamedTuple):
    """`plain` where every loader finds it under that name, with nothing put in front."""

    name: str
    plain: bool


@dataclass(frozen=True, slots=True)
class Spelling:
    """What a checkpoint may call the tensors of `model`, which has no weights.

    A key is the model's own name of a tensor, or of a part of it that checkpoints keep as a tensor.
    `shapes` has those that a key may have, `parts` the keys that make up each of the model's own
    tensors, `hub` the name that `save_pretrained` writes for a key.
    """

    model: PreTrainedModel
    own: Mapping[str, Shape]
    shapes: Mapping[str, frozenset[Shape]]
    parts: Mapping[str, frozenset[str]]
    hub: Mapping[str, str]

    def keys(self, names: Iterable[str]) -> dict[str, Key]:
        """The key of each name that has one, found as transformers' own loader finds it."""
        renamings, _ = _changes(self.model)
        before = self.model.base_model_prefix or None
        found = {}
        for name in sorted(names, key=dot_natural_key):
            renamed, _ = rename_source_key(name, renamings, [])
            for plain in (renamed, name):
                key, _ = rename_source_key(plain, [], [], before, self.shapes)
                if key in self.shapes:
                    found[name] = Key(key, plain=key == plain)
                    break
        return found


def of(model: PreTrainedModel) -> Spelling:
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    renamings, converters = _changes(model)
    shapes: dict[str, set[Shape]] = {name: {shape} for name, shape in own.items()}
    parts: dict[str, set[str]] = {}
    hub: dict[str, str] = {}
    for name, shape in _written(model).items():
        key, _ = rename_source_key(name, renamings, [])
        for made in _makes(name, renamings, converters):
            if made in own:
                shapes.setdefault(key, set()).add(shape)
                parts.setdefault(made, set()).add(key)
                hub[key] = name
    return Spelling(
        model,
        own,
        {key: frozenset(each) for key, each in shapes.items()},
        {name: frozenset(parts.get(name, {name})) for name in own},
        hub,
    )


def _changes(model: PreTrainedModel) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    """Anew each time: some of them remember what they have seen."""
    changes = get_model_conversion_mapping(model)
    return (
        [change for change in changes if isinstance(change, WeightRenaming)],
        [change for change in changes if isinstance(change, WeightConverter)],
    )


def _written(model: PreTrainedModel) -> dict[str, Shape]:
    """Name and shape of every tensor that `save_pretrained` would write of the whole state."""
    changes = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = [c for c in changes if not isinstance(c, PrefixChange)]
    state = {name: tensor.detach().to("meta") for name, tensor in model.state_dict().items()}
    written = revert_weight_conversion(model, state)
    return {name: tuple(tensor.shape) for name, tensor in written.items()}


def _makes(
    name: str, renamings: list[WeightRenaming], converters: list[WeightConverter]
) -> list[str]:
    """The model's own tensors that one of a checkpoint becomes, or becomes part of."""
    made, pattern = rename_source_key(name, renamings, converters)
    if pattern is None:
        return [made]
    change = [each for each in converters if pattern in each.source_patterns][-1]
    first = change.target_patterns[0]
    return [made.replace(first, target) for target in change.target_patterns]


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
