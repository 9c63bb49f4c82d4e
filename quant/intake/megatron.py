"""Megatron-LM checkpoints of Llama shape under Hugging Face's names.

A fused `linear_qkv` holds, for each group of the attention, its queries, its key and its value; a
fused `linear_fc1` the gate above the up projection. Layers are numbered, or stacked in one tensor.
The vocabulary is padded for the ranks, and cut here to config.json's. Refuses experts, biases and
positions that Llama, Mistral, Qwen2 and Qwen3 do not have.

Names: megatron/core/models/gpt/gpt_layer_specs.py and transformer/{attention,mlp}.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from quant import foreign_json
from quant.errors import SourceError, brief
from quant.intake import dcp, megatron_ranks, naming, unpickle
from quant.intake.architecture import Outline
from quant.intake.dcp import Sharded
from quant.intake.stored import Checkpoint, Weight, derived

LATEST = "latest_checkpointed_iteration.txt"
_MOST_LAYERS = 10_000
_KNOWN = ("llama", "mistral", "qwen2", "qwen3")
_EMBEDDING = "embedding.word_embeddings.weight"
_STACKED = re.compile(r"decoder\.layers\.(?!\d)")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_NO_WEIGHTS = re.compile(r"_extra_state|inv_freq$|rotary_pos_emb\.")
_OURS = ("embedding.", "decoder.", "output_layer.")

_TOP = {
    _EMBEDDING: "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_PLAIN = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.weight_w": "mlp.gate_proj.weight",
    "mlp.linear_fc1.weight_v": "mlp.up_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
_QKV = re.compile(r"self_attention\.linear_qkv\.(weight|bias)")
_GATED = "mlp.linear_fc1.weight"
# What changes the answer and leaves no trace in the shapes.
_REFUSED_ARGS = (
    "apply_layernorm_1p",
    "rotary_interleaved",
    "num_experts",
    "multi_latent_attention",
)


def find(folder: Path) -> Path | None:
    """The iteration's folder; None where Megatron left nothing."""
    if megatron_ranks.is_one(folder) or _is_dist(folder):
        return folder
    iterations = sorted(path for path in folder.glob("iter_*") if path.is_dir())
    if not (folder / LATEST).is_file():
        if len(iterations) > 1:
            names = ", ".join(path.name for path in iterations)
            raise SourceError(f"{folder} holds {names} and no {LATEST}: give one of them")
        return iterations[0] if iterations and _is_any(iterations[0]) else None
    said = (folder / LATEST).read_text("utf-8", "replace").strip()
    if not (said.isdigit() or said == "release"):
        raise SourceError(f"{folder / LATEST} names no iteration: {said!r:.40}")
    found = folder / (f"iter_{int(said):07}" if said.isdigit() else said)
    if not _is_any(found):
        raise SourceError(f"{folder / LATEST} names {found.name}, which holds no checkpoint")
    return found


def read(folder: Path) -> Checkpoint:
    """Tensors by Megatron's names, ranks put together and layers numbered from 0."""
    if megatron_ranks.is_one(folder):
        checkpoint, arguments = megatron_ranks.read(folder)
        _check_arguments(folder, arguments)
        return checkpoint
    common = folder / "common.pt"
    content = unpickle.load(common) if common.is_file() else {}
    _check_arguments(common, content.get("args") if isinstance(content, dict) else None)
    tensors = dcp.read(folder)
    prefix = _prefix(folder, tensors)
    weights = {
        name: weight
        for full, tensor in tensors.items()
        if full.startswith(tuple(f"{prefix}{ours}" for ours in _OURS))
        for name, weight in _layers(full.removeprefix(prefix), tensor)
    }
    return Checkpoint(dcp.files(folder), weights)


def named(weights: Mapping[str, Weight], outline: Outline, where: Path) -> dict[str, Weight]:
    """The architecture's tensors; SourceError names `where` and what differs."""
    config = outline.config
    if config.model_type not in _KNOWN:
        raise SourceError(
            f"{where} is Megatron's, which is read for {', '.join(_KNOWN)}; config.json says"
            f" {config.model_type}"
        )
    found: dict[str, Weight] = {}
    for name, weight in weights.items():
        if not _NO_WEIGHTS.search(name):
            found |= _renamed(name, weight, config, where)
    for name in set(outline.vocabulary) & found.keys():
        found[name] = _cut(found[name], config.vocab_size)
    return naming.admitted(found, outline, where)


def _is_dist(folder: Path) -> bool:
    if not (folder / "metadata.json").is_file():
        return dcp.is_one(folder) and (folder / "common.pt").is_file()
    try:
        backend = foreign_json.read(folder / "metadata.json")["sharded_backend"]
    except (ValueError, LookupError, TypeError):
        return False
    if backend != "torch_dist":
        raise SourceError(
            f"{folder} is in Megatron's {brief(backend)} format: save it with --ckpt-format"
            " torch_dist"
        )
    if not dcp.is_one(folder):
        raise SourceError(f"{folder} has no {dcp.METADATA}: copy that file too")
    return True


def _is_any(folder: Path) -> bool:
    return folder.is_dir() and (megatron_ranks.is_one(folder) or _is_dist(folder))


def _check_arguments(where: Path, arguments: Any) -> None:
    if isinstance(arguments, unpickle.Inert):
        for name in _REFUSED_ARGS:
            if arguments.get(name):
                raise SourceError(f"{where} was trained with {name}, which Llama's shape has not")


def _prefix(folder: Path, tensors: Mapping[str, Sharded]) -> str:
    """What a wrapper put before every name (`module.`)."""
    ends = [n.removesuffix(_EMBEDDING) for n in tensors if n.endswith(_EMBEDDING)]
    found = sorted((end for end in ends if "optim" not in end), key=len)
    if not found:
        raise SourceError(f"{folder} has no {_EMBEDDING}: it is no Megatron GPT checkpoint")
    return found[0]


def _layers(name: str, tensor: Sharded) -> Iterator[tuple[str, Weight]]:
    """A stack of layers as one tensor each."""
    if not _STACKED.match(name):
        yield name, tensor.weight()
    elif not _NO_WEIGHTS.search(name):
        if not tensor.shape or not 0 < tensor.shape[0] <= _MOST_LAYERS:
            raise SourceError(f"{tensor.folder}: {name} {list(tensor.shape)} is no stack of layers")
        for place in range(tensor.shape[0]):
            yield _STACKED.sub(f"decoder.layers.{place}.", name), tensor.row(place)


def _renamed(name: str, weight: Weight, config: PretrainedConfig, where: Path) -> dict[str, Weight]:
    if name in _TOP:
        return {_TOP[name]: weight}
    layer = _LAYER.fullmatch(name)
    if layer is None:
        raise SourceError(f"{where} has {name}, which a model of Llama's shape has not")
    prefix, leaf = f"model.layers.{layer[1]}", layer[2]
    if leaf in _PLAIN:
        return {f"{prefix}.{_PLAIN[leaf]}": weight}
    if leaf == _GATED:
        parts = {"mlp.gate_proj.weight": 0, "mlp.up_proj.weight": 1}
        shape = (weight.shape[0] // 2, *weight.shape[1:])
        halves = {n: derived(weight, shape, partial(_half, place=p)) for n, p in parts.items()}
        return {f"{prefix}.{end}": half for end, half in halves.items()}
    if fused := _QKV.fullmatch(leaf):
        split = _attention(weight, config, where / name)
        return {f"{prefix}.self_attn.{end}_proj.{fused[1]}": part for end, part in split.items()}
    raise SourceError(f"{where} has {name}, which a model of Llama's shape has not")


def _attention(weight: Weight, config: PretrainedConfig, where: Path) -> dict[str, Weight]:
    groups, heads = config.num_key_value_heads, config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    each = heads // groups  # queries of a group
    if weight.shape[0] != groups * (each + 2) * width:
        raise SourceError(
            f"{where} has {weight.shape[0]} rows; config.json's {heads} heads in {groups} groups of"
            f" {width} make {groups * (each + 2) * width}"
        )
    places = {"q": (0, each), "k": (each, each + 1), "v": (each + 1, each + 2)}
    found = {}
    for end, (first, last) in places.items():
        shape = (groups * (last - first) * width, *weight.shape[1:])
        cut = partial(_of_groups, groups=groups, first=first * width, last=last * width)
        found[end] = derived(weight, shape, cut)
    return found


def _of_groups(fused: Tensor, *, groups: int, first: int, last: int) -> Tensor:
    """Rows [first, last) of every group, one group under the other."""
    grouped = fused.view(groups, -1, *fused.shape[1:])  # [groups, rows of a group, columns]
    return grouped[:, first:last].reshape(-1, *fused.shape[1:])


def _half(fused: Tensor, *, place: int) -> Tensor:
    return fused.chunk(2)[place].contiguous()


def _cut(weight: Weight, rows: int) -> Weight:
    if weight.shape[0] <= rows:
        return weight
    return derived(weight, (rows, *weight.shape[1:]), lambda padded: padded[:rows].contiguous())
