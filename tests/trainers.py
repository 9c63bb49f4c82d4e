"""Checkpoints as trainers lay them out, written from a plain state dict and nothing of ours.

ZeRO after DeepSpeed's engine.py and zero_to_fp32.py, Megatron after megatron/core; both layouts
were held against files that those programs wrote.
"""

from __future__ import annotations

import argparse
import io
import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from transformers import PreTrainedModel

from tests import tiny

State = Mapping[str, Tensor]
Parts = Sequence[tuple[tuple[int, ...], Tensor]]  # (offsets in the whole, part)

LAYERS, HEADS, GROUPS, WIDTH = 2, 4, 2, 16  # of tiny.model("llama")
PADDED = 384  # rows of a vocabulary padded for Megatron's ranks


def companions(folder: Path, *, tied: bool = False, dtype: str = "float32") -> Path:
    """config.json and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny.tokenizer(folder)
    made = tiny.model(tied=tied)
    made.config.architectures = ["LlamaForCausalLM"]
    made.config.dtype = dtype
    made.config.save_pretrained(folder)
    return folder


@contextmanager
def foreign(module: str, name: str) -> Iterator[type]:
    """A class that pickles as one of a package that is not installed."""
    tops = module.split(".")
    names = [".".join(tops[: place + 1]) for place in range(len(tops))]
    assert not any(made in sys.modules for made in names)

    class Foreign:
        def __init__(self, value: int = 0) -> None:
            self.value = value

        def __reduce__(self) -> tuple[type, tuple[int]]:
            return Foreign, (self.value,)

    Foreign.__module__, Foreign.__qualname__ = module, name
    for made in names:
        sys.modules[made] = types.ModuleType(made)
    setattr(sys.modules[module], name, Foreign)
    try:
        yield Foreign
    finally:
        for made in names:
            del sys.modules[made]


def zero(
    folder: Path,
    model: PreTrainedModel,
    *,
    stage: int,
    world: int,
    frozen: Sequence[str] = (),
    prefix: str = "",
    step: int = 7,
) -> Path:
    """A DeepSpeed folder with two parameter groups; `frozen` parameters are not trained.

    Returns the step's folder.
    """
    home = folder / f"global_step{step}"
    home.mkdir(parents=True, exist_ok=True)
    (folder / "latest").write_text(home.name)
    parameters = dict(model.named_parameters())
    kept = [(n, p.detach()) for n, p in parameters.items() if n not in frozen]
    groups = [[pair for pair in kept if (pair[1].dim() > 1) == wide] for wide in (True, False)]
    cut = _flat_per_parameter if stage == 3 else _flat_per_group
    flats = cut(groups, world)
    with foreign("deepspeed.runtime.zero.config", "ZeroStageEnum") as kind:
        enum = kind(stage)
        for rank in range(world):
            state = _optimizer(enum, stage, flats[rank], world, step)
            torch.save(state, home / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    for rank in range(world if stage == 3 else 1):
        name = f"zero_pp_rank_{rank}_" if stage == 3 else ""
        content = _model(model, groups, frozen, (stage, world, rank)) | {"global_steps": step}
        torch.save(content, home / f"{name}mp_rank_00_model_states.pt")
    return home


def _optimizer(
    enum: object, stage: int, flats: list[Tensor], world: int, step: int
) -> dict[str, Any]:
    inner = {"state": {0: {"step": torch.tensor(float(step)), "exp_avg": flats[0] * 0}}}
    if stage == 3:
        state = {"zero_stage": enum, "partition_count": world, "optimizer_state_dict": inner}
        return {"optimizer_state_dict": state | {"fp32_flat_groups": flats}, "ds_config": {}}
    state = {
        "zero_stage": enum,
        "partition_count": [world] * len(flats),
        "base_optimizer_state": inner,
        "single_partition_of_fp32_groups": flats,
    }
    return {"optimizer_state_dict": state, "ds_version": "0.19.8"}


def _flat_per_group(groups: list[list[tuple[str, Tensor]]], world: int) -> list[list[Tensor]]:
    """Each group one vector, padded to 2 * world, cut in `world`; the last loses its padding."""
    ranks: list[list[Tensor]] = [[] for _ in range(world)]
    for group in groups:
        vector = torch.cat([p.flatten() for _, p in group])
        padding = -vector.numel() % (2 * world)
        pieces = torch.cat([vector, torch.full((padding,), 9.0)]).chunk(world)
        for rank, piece in enumerate(pieces):
            last = rank == world - 1 and padding < piece.numel()
            ranks[rank].append(piece[: piece.numel() - padding].clone() if last else piece.clone())
    return ranks


def _flat_per_parameter(groups: list[list[tuple[str, Tensor]]], world: int) -> list[list[Tensor]]:
    """Each rank's share of every parameter, in two flat groups that cut one in the middle."""
    ranks = []
    for rank in range(world):
        shares = [_share(p, world, rank) for group in groups for _, p in group]
        vector = torch.cat(shares)
        middle = shares[0].numel() // 2
        ranks.append([vector[:middle].clone(), vector[middle:].clone()])
    return ranks


def _share(parameter: Tensor, world: int, rank: int) -> Tensor:
    flat = parameter.detach().flatten()
    size = -(-flat.numel() // world)
    padded = torch.cat([flat, torch.full((size * world - flat.numel(),), 9.0, dtype=flat.dtype)])
    return padded[rank * size : (rank + 1) * size].clone()


def _model(
    model: PreTrainedModel,
    groups: list[list[tuple[str, Tensor]]],
    frozen: Sequence[str],
    place: tuple[int, int, int],
) -> dict[str, Any]:
    stage, world, rank = place
    parameters = dict(model.named_parameters())
    whole = OrderedDict((n, t.to(torch.bfloat16)) for n, t in model.state_dict().items())
    held = OrderedDict((n, t if n in frozen else whole[n]) for n, t in model.state_dict().items())
    empty = OrderedDict((n, torch.empty(0)) for n in whole)
    shapes = [OrderedDict((n, p.shape) for n, p in group) for group in groups]
    fragments = {
        1: None,  # DeepSpeed leaves the frozen ones of stage 1 in `module` alone
        2: {n: parameters[n].detach() for n in frozen},
        3: {n: _share(parameters[n], world, rank) for n in frozen},
    }[stage]
    head = {"lm_head.weight": "model.embed_tokens.weight"}
    return {
        "module": empty if stage == 3 else held,
        "buffer_names": [],
        "param_shapes": shapes,
        "frozen_param_shapes": {n: parameters[n].shape for n in frozen} if fragments else None,
        "frozen_param_fragments": fragments,
        "shared_params": head if model.config.tie_word_embeddings else {},
        "ds_version": "0.19.8",
    }


def megatron(state: State) -> dict[str, Tensor]:
    """Megatron core's tensors: fused, and the vocabulary padded with what nobody may read."""
    made: dict[str, Tensor] = {"decoder.final_layernorm.weight": state["model.norm.weight"]}
    for ours, theirs in (
        ("model.embed_tokens.weight", "embedding.word_embeddings.weight"),
        ("lm_head.weight", "output_layer.weight"),
    ):
        if ours in state:
            rows, columns = state[ours].shape
            made[theirs] = torch.cat([state[ours], torch.full((PADDED - rows, columns), 9.0)])
    for place in range(LAYERS):
        layer, out = f"model.layers.{place}", f"decoder.layers.{place}"
        q, k, v = (state[f"{layer}.self_attn.{n}_proj.weight"] for n in "qkv")
        grouped = [part.reshape(GROUPS, -1, WIDTH, part.shape[1]) for part in (q, k, v)]
        attention, mlp = f"{out}.self_attention", f"{out}.mlp"
        made |= {
            f"{attention}.linear_qkv.weight": torch.cat(grouped, 1).reshape(-1, q.shape[1]),
            f"{attention}.linear_qkv.layer_norm_weight": state[f"{layer}.input_layernorm.weight"],
            f"{attention}.linear_proj.weight": state[f"{layer}.self_attn.o_proj.weight"],
            f"{mlp}.linear_fc1.layer_norm_weight": state[
                f"{layer}.post_attention_layernorm.weight"
            ],
            f"{mlp}.linear_fc1.weight": torch.cat(
                [state[f"{layer}.mlp.gate_proj.weight"], state[f"{layer}.mlp.up_proj.weight"]]
            ),
            f"{mlp}.linear_fc2.weight": state[f"{layer}.mlp.down_proj.weight"],
        }
    return made


def split(name: str, tensor: Tensor, ranks: int, rank: int) -> Tensor:
    """A tensor-parallel rank's share."""
    if name.endswith("linear_fc1.weight"):
        return torch.cat([half.chunk(ranks)[rank] for half in tensor.chunk(2)])
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return tensor.chunk(ranks, 1)[rank].clone()
    if name.endswith(("linear_qkv.weight", "word_embeddings.weight", "output_layer.weight")):
        return tensor.chunk(ranks)[rank].clone()
    return tensor


def megatron_ranks(folder: Path, state: State, *, tensor: int, pipeline: int) -> Path:
    """The classic layout, in iter_0000005 with the file that names it; returns that folder."""
    home = folder / "iter_0000005"
    (folder / "x").parent.mkdir(parents=True, exist_ok=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("5")
    whole = megatron(state)
    arguments = argparse.Namespace(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, swiglu=True
    )
    each = LAYERS // pipeline
    for t in range(tensor):
        for p in range(pipeline):
            part = {
                f"decoder.layers.{int(n.split('.')[2]) - p * each}.{n.split('.', 3)[3]}": w
                for n, w in whole.items()
                if n.startswith("decoder.layers.") and int(n.split(".")[2]) // each == p
            }
            first, last = p == 0, p == pipeline - 1
            part |= {n: w for n, w in whole.items() if n.startswith("embedding.") and first}
            part |= {
                n: w for n, w in whole.items() if n.startswith(("output", "decoder.final")) and last
            }
            model = OrderedDict((n, split(n, w, tensor, t)) for n, w in part.items())
            model["decoder.layers.0.mlp.linear_fc1._extra_state"] = None  # type: ignore[assignment]
            name = f"mp_rank_{t:02}" + (f"_{p:03}" if pipeline > 1 else "")
            (home / name).mkdir(parents=True)
            content = {"args": arguments, "checkpoint_version": 3.0, "iteration": 5}
            torch.save(content | {"model": model}, home / name / "model_optim_rng.pt")
    return home


def dcp(folder: Path, tensors: Mapping[str, Parts], files: int = 2) -> Path:
    """A torch.distributed.checkpoint folder whose parts several ranks wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [io.BytesIO() for _ in range(files)]
    entries: dict[str, Any] = {"rng_state": BytesStorageMetadata()}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for name, parts in tensors.items():
        chunks = []
        for place, (offsets, part) in enumerate(parts):
            out = written[place % files]
            begin = out.tell()
            archive = io.BytesIO()
            torch.save(part.contiguous().clone(), archive)
            out.write(archive.getvalue())
            info = _StorageInfo(f"__{place % files}_0.distcp", begin, out.tell() - begin)
            storage[MetadataIndex(name, offsets)] = info
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), part.shape))
        ends = [[o + s for o, s in zip(offs, p.shape, strict=True)] for offs, p in parts]
        size = torch.Size(max(end) for end in zip(*ends, strict=True))
        properties = TensorProperties(dtype=parts[0][1].dtype)
        entries[name] = TensorStorageMetadata(properties, size, chunks)
    for place, out in enumerate(written):
        (folder / f"__{place}_0.distcp").write_bytes(out.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(entries, None, storage)))
    return folder


def megatron_dist(
    folder: Path, state: State, *, tensor: int, pipeline: int, stacked: bool = False
) -> Path:
    """Megatron's torch_dist layout, every layer by itself or all `stacked` in one tensor.

    As Megatron does, a pipeline stage writes the layers that it has: each is a part of the stack.
    """
    tensors: dict[str, list[tuple[tuple[int, ...], Tensor]]] = {}
    for name, whole in megatron(state).items():
        at: tuple[int, ...] = ()
        full = name
        if stacked and name.startswith("decoder.layers."):
            at = (int(name.split(".")[2]),)
            full = f"decoder.layers.{name.split('.', 3)[3]}"
        parts = tensors.setdefault(full, [])
        for offsets, part in _grid(name, whole, tensor):
            parts.append(((*at, *offsets), part.reshape(*(1 for _ in at), *part.shape)))
    dcp(folder, tensors, files=tensor * pipeline)
    arguments = argparse.Namespace(tensor_model_parallel_size=tensor, num_layers=LAYERS)
    torch.save({"args": arguments, "iteration": 1}, folder / "common.pt")
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    return folder


def _grid(name: str, whole: Tensor, ranks: int) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Parts as the ranks hold them; of a gate above an up projection, each rank has two."""
    if name.endswith("linear_fc1.weight"):
        parts, axis = whole.chunk(2 * ranks), 0
    else:
        shares = [split(name, whole, ranks, rank) for rank in range(ranks)]
        axis = 1 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0
        parts = tuple(shares) if shares[0].shape != whole.shape else (whole,)
    at = 0
    for part in parts:
        offsets = [0] * part.dim()
        offsets[axis] = at
        at += part.shape[axis]
        yield tuple(offsets), part
