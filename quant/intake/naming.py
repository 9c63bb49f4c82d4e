"""Tensors of a trainer's state dict under the names that the architecture gives them.

Trainers save the optimizer beside them, and torchtitan keeps Llama's original names and rotary
layout. What is there then goes through `quant.intake.door`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from quant.errors import SourceError
from quant.intake import door
from quant.intake.architecture import Outline
from quant.intake.stored import Weight, derived

_NOT_WEIGHTS = re.compile(r"(?:^|\.)(?:optim\w*|lr_scheduler|train_state|dataloader)\.|inv_freq$")

# torchtitan's and Meta's own names: https://github.com/pytorch/torchtitan, models/llama3.
_TITAN = "tok_embeddings.weight"
_TITAN_TOP = {
    _TITAN: "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_TITAN_LAYER = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}

Weights = Mapping[str, Weight]


def named(weights: Weights, outline: Outline, where: Path) -> dict[str, Weight]:
    """The architecture's tensors, each once; SourceError names `where` and what differs."""
    given = {name: weight for name, weight in weights.items() if not _NOT_WEIGHTS.search(name)}
    ends = [name.removesuffix(_TITAN) for name in given if name.endswith(_TITAN)]
    if ends:
        given = _from_titan(_under(given, min(ends, key=len)), outline, where)
    return admitted(given, outline, where)


def admitted(weights: Weights, outline: Outline, where: Path) -> dict[str, Weight]:
    """By the names to have; what is tied and holds nothing else is left out."""
    found = door.admitted(weights, outline, where)
    return {
        tensor.name: weights[tensor.given]
        for key, tensor in found.tensors.items()
        if key not in found.copies
    }


def _under(weights: Weights, prefix: str) -> dict[str, Weight]:
    return {
        name.removeprefix(prefix): weight
        for name, weight in weights.items()
        if name.startswith(prefix)
    }


def _from_titan(weights: Weights, outline: Outline, where: Path) -> dict[str, Weight]:
    config = outline.config
    if config.model_type != "llama":
        raise SourceError(
            f"{where} has torchtitan's names, which are read for Llama and not for"
            f" {config.model_type}: save it with checkpoint.last_save_in_hf"
        )
    heads = {"wq": config.num_attention_heads, "wk": config.num_key_value_heads}
    found = {}
    for name, weight in weights.items():
        layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        if name in _TITAN_TOP:
            found[_TITAN_TOP[name]] = weight
        elif layer and layer[2] in _TITAN_LAYER:
            count = heads.get(layer[2].split(".")[1])
            turned = (
                derived(weight, weight.shape, partial(_halves, heads=count)) if count else weight
            )
            found[f"model.layers.{layer[1]}.{_TITAN_LAYER[layer[2]]}"] = turned
        elif name != "freqs_cis":
            found[name] = weight
    return found


def _halves(weight: Tensor, *, heads: int) -> Tensor:
    """Rotary pairs (0, 1), (2, 3) ... of each head as two halves, which transformers rotates."""
    rows, columns = weight.shape
    pairs = weight.view(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)
