"""What merging does to a model beside its numbers: a tied head that parts, a vocabulary that grows.

Knows where a model's embedding and head are. Refuses adapters that change what the base lacks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors import safe_open
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from quant.errors import AdapterError
from quant.headers import read_headers
from quant.intake import architecture
from quant.lora import adapter as lora
from quant.lora import placement
from quant.lora.adapter import Adapter
from quant.lora.placement import Names

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Anatomy:
    """What the base's files call a model's parts; `linears` says which of them are stored
    [in, out], as Conv1D is."""

    names: Names
    embedding: str  # a tensor, as in "model.embed_tokens.weight"
    head: str
    tied: bool
    linears: Mapping[str, bool]  # tensors of linear layers in the blocks


@dataclass(frozen=True, slots=True)
class Plan:
    """What the merged model's config.json has to say differently; None for what stays."""

    untie: bool
    vocabulary: int | None


def of(config: PretrainedConfig, stored: Iterable[str]) -> Anatomy:
    """Read off the architecture's own code, built without weights; `stored` are its files' tensors.

    AdapterError for a base without an embedding or an output head.
    """
    model = architecture.hollow(config)
    names = placement.names(model, stored)
    called = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        raise AdapterError(f"{config.architectures[0]} has no output head to merge into")
    linears = {
        called[id(module)]: isinstance(module, Conv1D)
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    if called[id(embedding)] not in names.stored:
        raise AdapterError(
            f"the base has no {called[id(embedding)]}, nor any other name of it: it is not whole",
            field=called[id(embedding)],
        )
    found = names.of([called[id(embedding)], called[id(head)], *linears])
    return Anatomy(
        names=names,
        embedding=found[called[id(embedding)]],
        head=found[called[id(head)]],
        tied=architecture.is_tied(config),
        linears={found[name]: turned for name, turned in linears.items()},
    )


def plan(anatomy: Anatomy, base: Mapping[str, Shape], adapters: Sequence[Adapter]) -> Plan:
    """How the merged model differs in kind; AdapterError where an adapter does not fit `base`.

    `base` is the shape of every tensor, the adapters are placed (`quant.lora.placement`). A tied
    head counts as a tensor, shaped as its embedding.
    """
    shapes = dict(base)
    if anatomy.tied:
        shapes[anatomy.head] = shapes[anatomy.embedding]
    if anatomy.head not in shapes:
        raise AdapterError(
            f"the base has no {anatomy.head}, and config.json does not tie it to the embedding",
            field=anatomy.head,
        )
    rows = shapes[anatomy.embedding][0]
    sizes = {rows}
    for adapter in adapters:
        after = _replaced(anatomy, shapes, adapter)
        modules = {n.removesuffix(".weight"): s for n, s in after.items() if len(s) == 2}
        lora.validate(
            adapter,
            {module: (size[0], size[1]) for module, size in modules.items()},
            max_rank=None,
            base_weights_fingerprint=None,
        )
        sizes |= _vocabulary(anatomy, after, adapter)
    moved = [a for a in adapters if {anatomy.embedding, anatomy.head} & a.parts.tensors()]
    grown = sizes - {rows}
    if grown and len(moved) > 1:
        raise _alone(moved[0], "resizes the vocabulary")
    untie = anatomy.tied and not all(_moves_both(anatomy, adapter) for adapter in moved)
    if untie and len(moved) > 1 and any(adapter.parts.rows for adapter in moved):
        raise _alone(moved[0], "retrains rows that the base ties to its head")
    return Plan(untie, grown.pop() if grown else None)


def _replaced(anatomy: Anatomy, shapes: Mapping[str, Shape], adapter: Adapter) -> dict[str, Shape]:
    """Every tensor's shape once the adapter's whole tensors are in place."""
    parts, after = adapter.parts, dict(shapes)
    headers = read_headers(adapter.weights)
    for name in sorted(parts.tensors()):
        if name not in shapes:
            raise AdapterError(
                f"adapter {adapter.folder} does not fit the base: {name}: no such tensor in the"
                " base; where PEFT loads it on that, merge_and_unload() makes a plain model of it",
                field=name,
                expected="no such module in the base",
                found=name,
            )
    given = {**parts.copies, **parts.whole}
    for name, key in given.items():
        size = headers[key].shape
        free = 1 if name in (anatomy.embedding, anatomy.head) else 0
        if len(size) != len(shapes[name]) or size[free:] != shapes[name][free:]:
            raise AdapterError(
                f"adapter {adapter.folder} does not fit the base: {name}: expected"
                f" {list(shapes[name])}, found {list(size)}",
                field=name,
                expected=str(list(shapes[name])),
                found=str(list(size)),
            )
        after[name] = size
    return after


def _vocabulary(anatomy: Anatomy, after: Mapping[str, Shape], adapter: Adapter) -> set[int]:
    embedding, head = after[anatomy.embedding][0], after[anatomy.head][0]
    if embedding != head:
        raise AdapterError(
            f"adapter {adapter.folder} has {embedding} rows in the embedding and {head} in the"
            " head; save it again with save_embedding_layers=True",
            field=anatomy.head,
            expected=str(embedding),
            found=str(head),
        )
    for module, (_, rows) in adapter.parts.rows.items():
        count = after[f"{module}.weight"][0]
        if rows and not 0 <= min(rows) <= max(rows) < count:
            raise AdapterError(
                f"adapter {adapter.folder} retrains row {max(rows)} of {count}",
                field="trainable_token_indices",
                expected=f"below {count}",
                found=str(max(rows)),
            )
    return {embedding}


def _moves_both(anatomy: Anatomy, adapter: Adapter) -> bool:
    """True where an adapter changes a tied embedding and its head to the same numbers."""
    parts = adapter.parts
    modules = {name.removesuffix(".weight") for name in (anatomy.embedding, anatomy.head)}
    if modules & set(parts.pairs):
        return False
    if modules & set(parts.rows):
        return True  # PEFT trains such rows in the tied head as well
    keys = [parts.whole.get(anatomy.embedding), parts.whole.get(anatomy.head)]
    if None in keys:
        return False
    with safe_open(adapter.weights, framework="pt") as file:
        embedding, head = (file.get_tensor(str(key)) for key in keys)
    return torch.equal(embedding, head)


def _alone(adapter: Adapter, what: str) -> AdapterError:
    return AdapterError(
        f"adapter {adapter.folder} {what}: it merges alone, not with another that changes the"
        " embedding or the head",
        field="adapter",
    )
