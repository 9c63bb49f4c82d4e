"""An adapter's parts under the names that its base's files have for them.

PEFT names modules as transformers has them in memory, which is not always how the base is stored:
a language model behind a vision tower, an output head called embed_out, all experts of a block in
one parameter. transformers' own tables (`quant.intake.spelling`) say what becomes of each name; an
adapter may have any that they lead from, and so keep those of an older transformers. Refuses
adapted experts that do not fit the base.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from transformers import PretrainedConfig, PreTrainedModel

from quant.errors import AdapterError, SourceError
from quant.intake import architecture, spelling
from quant.intake.spelling import Part, Shape
from quant.lora.adapter import Adapter
from quant.lora.lora_parts import NESTED, Pair, Share, check_rank

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Names:
    """What a base calls its tensors: `model` is its architecture without memory, `stored` the names
    in its files by the model's own, a tied head among them as the model's own."""

    model: PreTrainedModel
    stored: Mapping[str, str]

    def of(self, given: Iterable[str]) -> dict[str, str]:
        """The stored name of each tensor; what the base does not have keeps the name it came by."""
        own = _own_names(self.model, given)
        return {name: self.stored.get(theirs, name) for name, theirs in own.items()}


def names(model: PreTrainedModel, stored: Iterable[str]) -> Names:
    """`stored` are the names of all tensors in the base's files."""
    found = {own: name for name, own in _own_names(model, stored).items()}
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head:
            found.setdefault(f"{name}.weight", f"{name}.weight")
    return Names(model, found)


def beside(adapter: Adapter, config: PretrainedConfig, modules: Iterable[str]) -> Adapter:
    """The adapter by the names of a base, quantized or not, whose layers these are.

    AdapterError as `placed`; SourceError where transformers cannot build the base.
    """
    model = architecture.hollow(config)
    return placed(adapter, names(model, (f"{module}.weight" for module in modules)))


def placed(adapter: Adapter, base: Names) -> Adapter:
    """The adapter with its parts by the base's names, each expert's pair apart.

    AdapterError where two of them are one tensor of the base, or experts do not fit it.
    """
    parts = adapter.parts
    pairs = _moved(adapter, base, parts.pairs, "weight") | dict(_experts(adapter, base))
    made = replace(
        parts,
        pairs=dict(sorted(pairs.items())),
        magnitudes=_moved(adapter, base, parts.magnitudes, "weight"),
        offsets=_moved(adapter, base, parts.offsets, "bias"),
        rows=_moved(adapter, base, parts.rows, "weight"),
        whole=_renamed(adapter, base, parts.whole),
        copies=_renamed(adapter, base, parts.copies),
        stacked={},
    )
    return replace(adapter, parts=made)


def _own_names(model: PreTrainedModel, given: Iterable[str]) -> dict[str, str]:
    """The model's own name of each tensor; a model without its head is saved, and adapted, without
    the prefix that it has before one."""
    known, prefix = model.state_dict().keys(), model.base_model_prefix
    return {
        name: whole if own not in known and (whole := f"{prefix}.{own}") in known else own
        for name, own in spelling.own_names(model, given).items()
    }


def _moved(
    adapter: Adapter, base: Names, by_module: Mapping[str, _Value], leaf: str
) -> dict[str, _Value]:
    tensors = {f"{module}.{leaf}": value for module, value in by_module.items()}
    renamed = _renamed(adapter, base, tensors)
    return {name.removesuffix(f".{leaf}"): value for name, value in renamed.items()}


def _renamed(adapter: Adapter, base: Names, given: Mapping[str, _Value]) -> dict[str, _Value]:
    found: dict[str, _Value] = {}
    for name, stored in base.of(given).items():
        if stored in found:
            raise AdapterError(
                f"adapter {adapter.folder} changes {stored} of the base twice, once as {name}",
                field=name,
            )
        found[stored] = given[name]
    return found


def _experts(adapter: Adapter, base: Names) -> Iterator[tuple[str, Pair]]:
    """A pair for each stored layer of each expert whose stack is adapted, by its module."""
    if not adapter.parts.stacked:
        return
    if adapter.config.start is not None:
        raise AdapterError(
            f"adapter {adapter.folder} started from {adapter.config.start!r} on stacks of experts,"
            " which PEFT cannot do",
            field="init_lora_weights",
        )
    shapes = {name: tuple(p.shape) for name, p in base.model.named_parameters()}
    stacks = dict(_stacks(adapter, base, shapes))
    try:
        published = spelling.published(base.model, {name: shapes[name] for name in stacks})
    except SourceError as fault:
        raise _apart(adapter, next(iter(stacks)), str(fault)) from fault
    stored, known = base.of(published), set(base.stored.values())
    for name, part in published.items():
        if len(part.shape) != 2 or stored[name] not in known:
            raise _apart(adapter, part.of, f"the base has no tensor {stored[name]} for each expert")
        yield (
            stored[name].removesuffix(".weight"),
            _share(stacks[part.of], shapes[part.of], part),
        )


def _stacks(
    adapter: Adapter, base: Names, shapes: Mapping[str, Shape]
) -> Iterator[tuple[str, Pair]]:
    """The pair of each adapted stack, by the model's own name of it.

    PEFT wraps a module once for each of its parameters, in the order they were made in: the pair
    of the last one lies outermost.
    """
    depths: dict[str, dict[int, Pair]] = {}
    for name, pair in adapter.parts.stacked.items():
        depth = name.count(NESTED)
        depths.setdefault(name.replace(NESTED, ""), {})[depth] = pair
    own = _own_names(base.model, [f"{module}.weight" for module in depths])
    for module, nest in depths.items():
        home = own[f"{module}.weight"].removesuffix(".weight")
        held = [name for name in shapes if name.rpartition(".")[0] == home]
        targets = [
            name
            for name in held
            if adapter.config.targets(name)
            or adapter.config.targets(f"{module}.{name.rpartition('.')[2]}")
        ]
        if set(nest) != set(range(len(targets))):
            raise AdapterError(
                f"adapter {adapter.folder} has {len(nest)} pairs on {module}, and target_parameters"
                f" names {len(targets)} of the parameters that the base has there",
                field="target_parameters",
                expected=", ".join(held) or "no such module in the base",
                found=", ".join(adapter.config.target_parameters),
            )
        for depth, name in enumerate(reversed(targets)):
            yield name, _checked(adapter, nest[depth], module, name, shapes[name])


def _checked(adapter: Adapter, pair: Pair, module: str, own: str, shape: Shape) -> Pair:
    """The pair with the rank and scale of one expert. A stack is [experts, out, in]."""
    name = f"{module}.{own.rpartition('.')[2]}"
    fits = len(shape) == 3 and (pair.out_features, pair.in_features) == shape[1:]
    if not fits or pair.rank % shape[0]:
        raise AdapterError(
            f"adapter {adapter.folder} does not fit the base: {name} is {list(shape)} there, and"
            f" the adapter has A [{pair.rank}, {pair.in_features}] and B"
            f" [{pair.out_features}, {pair.rank}]",
            field=name,
            expected=str(list(shape)),
            found=f"[{pair.out_features}, {pair.in_features}] of rank {pair.rank}",
        )
    rank = pair.rank // shape[0]
    check_rank(adapter.weights, name, rank, adapter.config)
    return pair._replace(rank=rank, scale=adapter.config.scaling(name))


def _share(pair: Pair, shape: Shape, part: Part) -> Pair:
    expert, first = divmod(part.first, shape[1])
    return pair._replace(out_features=part.shape[0], share=Share(expert, shape[0], first))


def _apart(adapter: Adapter, name: str, reason: str) -> AdapterError:
    return AdapterError(
        f"adapter {adapter.folder} adapts {name}: {reason}; PEFT's merge_and_unload() makes a plain"
        " model of it",
        field=name,
    )
