"""Megatron-LM's classic checkpoints: one `model_optim_rng.pt` per tensor and pipeline rank.

Puts the ranks together: column-parallel tensors one under the other (the gate and the up half of a
fused one apart), row-parallel ones side by side, others from the first rank; and numbers the
layers through the pipeline's stages. Names older than Megatron core's become its own.

Layout: megatron/training/checkpointing.py, megatron/core/tensor_parallel/layers.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.errors import SourceError, brief
from quant.intake import fsdp, unpickle
from quant.intake.stored import Checkpoint, Stored, Weight, whole

FILE = "model_optim_rng.pt"
_RANK = re.compile(r"^mp_rank_(\d\d)(?:_(\d\d\d))?$")
_CHUNK = re.compile(r"^model\d*$")
_LAYER = re.compile(r"^(decoder\.layers\.)(\d+)(\..+)$")
_COLUMN = re.compile(
    r"(linear_qkv\.(weight|bias)|linear_fc1\.(weight|bias)|word_embeddings\.weight"
    r"|^output_layer\.weight)$"
)
_ROW = re.compile(r"(linear_proj|linear_fc2)\.weight$")
_GATED = re.compile(r"linear_fc1\.weight$")
# Before Megatron core: nested under `language_model`.
_OLD = (
    (r"^(?:module\.)+", ""),
    (r"^language_model\.", ""),
    (r"^encoder\.", "decoder."),
    (r"\.query_key_value\.", ".linear_qkv."),
    (r"\.self_attention\.dense\.", ".self_attention.linear_proj."),
    (r"\.dense_h_to_4h\.", ".linear_fc1."),
    (r"\.dense_4h_to_h\.", ".linear_fc2."),
    (r"\.input_norm\.", ".input_layernorm."),
    (r"\.post_attention_(?:layer)?norm\.", ".pre_mlp_layernorm."),
    (r"\.final_norm\.", ".final_layernorm."),
)

Grid = dict[tuple[int, int], Path]  # (tensor rank, pipeline rank) -> file
Tensors = dict[str, Stored]


def is_one(folder: Path) -> bool:
    return any(_RANK.match(path.parent.name) for path in folder.glob(f"mp_rank_*/{FILE}"))


def read(folder: Path) -> tuple[Checkpoint, Any]:
    """The tensors by Megatron core's names, and the first rank's training arguments."""
    grid = _grid(folder)
    contents = {place: unpickle.load(path) for place, path in grid.items()}
    _check(grid, contents)
    wide, deep = (1 + max(place[axis] for place in grid) for axis in (0, 1))
    weights: dict[str, Weight] = {}
    first = 0
    chunks = sorted(key for key in contents[0, 0] if _CHUNK.match(str(key)))
    # Virtual stages: every rank's first chunk comes before any rank's second.
    for chunk in chunks:
        for stage in range(deep):
            ranks = [_tensors(grid[t, stage], contents[t, stage], chunk) for t in range(wide)]
            merged = _merged(grid[0, stage], ranks)
            weights |= {_numbered(name, first): weight for name, weight in merged.items()}
            layers = {int(match[2]) for name in merged if (match := _LAYER.match(name))}
            if layers != set(range(len(layers))):
                raise SourceError(
                    f"{grid[0, stage]} numbers its layers {brief(sorted(layers))}, not from 0 on"
                )
            first += len(layers)
    return Checkpoint(tuple(grid.values()), weights), contents[0, 0].get("args")


def _grid(folder: Path) -> Grid:
    found: Grid = {}
    for path in sorted(folder.glob("mp_rank_*")):
        rank = _RANK.match(path.name)
        if rank is None:
            raise SourceError(f"{path} is of an expert-parallel run, which is not read")
        place = int(rank[1]), int(rank[2] or 0)
        if place in found:
            raise SourceError(f"{path} and {found[place].parent.name} are both of rank {place[0]}")
        found[place] = path / FILE
    wide, deep = (1 + max(place[axis] for place in found) for axis in (0, 1))
    for place in ((t, p) for t in range(wide) for p in range(deep)):
        if place not in found or not found[place].is_file():
            raise SourceError(
                f"{folder} lacks the {FILE} of tensor rank {place[0]}, pipeline rank {place[1]}:"
                " copy it too"
            )
    return dict(sorted(found.items()))


def _check(grid: Grid, contents: Mapping[tuple[int, int], Any]) -> None:
    """All of one step, and as many as the training arguments say."""
    first = contents[0, 0]
    for place, path in grid.items():
        content = contents[place]
        if not isinstance(content, dict) or not any(_CHUNK.match(str(key)) for key in content):
            raise SourceError(f"{path} is not a Megatron checkpoint: it holds no model")
        if content.get("iteration") != first.get("iteration"):
            raise SourceError(
                f"{path} is of iteration {content.get('iteration')}, its siblings of"
                f" {first.get('iteration')}: copy the files of one step"
            )
    version = first.get("checkpoint_version", 3)
    if not isinstance(version, int | float) or version < 2:
        raise SourceError(f"{grid[0, 0]} is of checkpoint_version {brief(version)}; 2 is needed")
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    for axis, name in enumerate(sizes):
        arguments = first.get("args")
        said = arguments.get(name) if isinstance(arguments, unpickle.Inert) else None
        there = 1 + max(place[axis] for place in grid)
        if isinstance(said, int) and said != there:
            raise SourceError(
                f"{grid[0, 0].parent.parent} holds {there} ranks of {name} {said}: copy all"
            )


def _tensors(path: Path, content: Mapping[str, Any], chunk: str) -> Tensors:
    if not isinstance(content.get(chunk), dict):
        raise SourceError(f"{path} has no {chunk}, which its siblings have")
    found: Tensors = {}
    for name, tensor in fsdp.flat(content[chunk], path):
        if (core := _core_name(name)) in found:
            raise SourceError(f"{path} holds {core} twice, once as {name}")
        found[core] = tensor
    return found


def _core_name(name: str) -> str:
    for old, new in _OLD:
        name = re.sub(old, new, name)
    return name


def _numbered(name: str, first: int) -> str:
    """A stage counts its layers from 0; `first` is how many stand before it."""
    layer = _LAYER.match(name)
    return f"{layer[1]}{int(layer[2]) + first}{layer[3]}" if layer else name


def _merged(path: Path, ranks: Sequence[Tensors]) -> dict[str, Weight]:
    for other in ranks[1:]:
        if other.keys() != ranks[0].keys():
            odd = min(other.keys() ^ ranks[0].keys())
            raise SourceError(f"{path} and its tensor ranks differ: not all of them have {odd}")
    found = {}
    for name, first in ranks[0].items():
        parts = [rank[name] for rank in ranks]
        axis = 0 if _COLUMN.search(name) else 1 if _ROW.search(name) else None
        if axis is None or len(parts) == 1:
            found[name] = whole(first)
            continue
        if len(first.shape) <= axis or any(part.shape != first.shape for part in parts):
            raise SourceError(f"{path}: {name} is of another shape on another tensor rank")
        size = first.shape[axis] * len(parts)
        shape = (*first.shape[:axis], size, *first.shape[axis + 1 :])
        join = _joined_halves if _GATED.search(name) else partial(_joined, axis=axis)
        found[name] = Weight(path, shape, first.dtype, partial(join, parts))
    return found


def _joined(parts: Sequence[Stored], *, axis: int) -> Tensor:
    return torch.cat([part.read() for part in parts], axis)


def _joined_halves(parts: Sequence[Stored]) -> Tensor:
    """Each rank has its own share of the gate above its share of the up projection."""
    gates, ups = zip(*(part.read().chunk(2) for part in parts), strict=True)
    return torch.cat([*gates, *ups])
