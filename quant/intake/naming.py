"""Tensors of a state dict under the names that the architecture gives them.

Trainers put their own in front (`model.`, `module.`, `app.model.`) or between (`_orig_mod.`), and
torchtitan keeps Llama's original names and rotary layout. Refuses what is missing, left over, of
another shape, or an adapter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from quant.errors import SourceError
from quant.intake.architecture import Outline, is_tied
from quant.intake.stored import Weight, derived

_WRAPPERS = re.compile(
    r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_flat_param)\."
)
_NOT_WEIGHTS = re.compile(r"(?:^|\.)(?:optim\w*|lr_scheduler|train_state|dataloader)\.|inv_freq$")
_ADAPTER = re.compile(r"\.lora_[AB]\b|\.lora_embedding_")

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
    given = {
        _WRAPPERS.sub("", name): weight
        for name, weight in weights.items()
        if not _NOT_WEIGHTS.search(name)
    }
    if lora := next((name for name in given if _ADAPTER.search(name)), None):
        raise SourceError(
            f"{where} holds a LoRA adapter ({lora}): save it with PEFT and give it as --adapter"
        )
    if prefixes := _prefixes(given, _TITAN):
        given = _from_titan(_under(given, prefixes[0]), outline, where)
    prefixes = _prefixes(given, outline.embedding)
    if not prefixes:
        raise SourceError(
            f"{where} has no {outline.embedding}: config.json is of another model, or the"
            " checkpoint is not whole"
        )
    found = _under(given, prefixes[0])
    if outline.published.keys() <= found.keys():  # experts one by one, as transformers 4 had them
        outline = replace(outline, shapes=outline.published)
    check(found, outline, where)
    return {name: found[name] for name in outline.shapes}


def check(found: Weights, outline: Outline, where: Path) -> None:
    """Every tensor is there, in its shape; rows of a vocabulary may be more or fewer."""
    if lacking := sorted(outline.shapes.keys() - found.keys()):
        raise SourceError(
            f"{where} lacks {lacking[0]}, one of {len(lacking)} that config.json asks for"
        )
    extra = sorted(found.keys() - outline.shapes.keys() - set(outline.vocabulary))
    if extra:
        raise SourceError(
            f"{where} has {extra[0]}, one of {len(extra)} tensors that config.json does not ask for"
        )
    for name, shape in outline.shapes.items():
        skip = 1 if name in outline.vocabulary else 0
        if found[name].shape[skip:] != shape[skip:]:
            raise SourceError(
                f"{where}: {name} is {list(found[name].shape)}, config.json says {list(shape)}"
            )
    _check_tied(found, outline, where)


def _check_tied(found: Weights, outline: Outline, where: Path) -> None:
    """A head beside the embedding that it is said to be must hold the same numbers."""
    if not is_tied(outline.config):
        return
    embedding = found[outline.embedding]
    for name in outline.vocabulary[1:]:
        head = found.get(name, embedding)
        if head is embedding:
            continue
        if head.shape != embedding.shape or not torch.equal(
            head.read().to(embedding.dtype), embedding.read()
        ):
            raise SourceError(
                f"{where}: {name} differs from {outline.embedding}, which config.json ties: set"
                " tie_word_embeddings to false there"
            )


def _prefixes(weights: Weights, name: str) -> list[str]:
    """What stands before `name`, shortest first."""
    found = (given.removesuffix(name) for given in weights if given.endswith(name))
    return sorted((prefix for prefix in found if not prefix or prefix.endswith(".")), key=len)


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
