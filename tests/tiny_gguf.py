"""GGUF files of tiny models, with the keys, names and layouts of llama.cpp's converter."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    RopeScalingType,
    get_tensor_name_map,
    quantize,
)
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from tests import tiny

ARCHITECTURES = {
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
    "mistral": "llama",
    "mixtral": "llama",
}
NAMES = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
Edit = Callable[[GGUFWriter], None]


def write(
    path: Path,
    model: PreTrainedModel,
    vocabulary: Path,
    *,
    edit: Edit | None = None,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    without: tuple[str, ...] = (),
) -> Path:
    """The model, and the tokenizer of the folder `vocabulary`. `edit` adds what it likes; `kind` is
    of all matrices; keys `without` are left out."""
    architecture = ARCHITECTURES.get(model.config.model_type, model.config.model_type)
    writer = GGUFWriter(path, architecture)
    _keys(writer, model.config)
    _tokenizer(writer, model.config, vocabulary)
    names = get_tensor_name_map(NAMES[architecture], model.config.num_hidden_layers)
    for name, tensor in _tensors(model).items():
        module, _, leaf = name.rpartition(".")
        found = names.get_name(module)
        assert found, name
        matrix = tensor.ndim > 1 and kind != GGMLQuantizationType.F32
        content = tensor.detach().float().numpy()
        if matrix:
            writer.add_tensor(f"{found}.{leaf}", quantize(content, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{found}.{leaf}", content)
    for key in without:
        del writer.kv_data[0][key]
    if edit is not None:
        edit(writer)
    return finish(writer)


def finish(writer: GGUFWriter) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert isinstance(writer.path, Path)
    return writer.path


def _keys(writer: GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(getattr(config, "norm_epsilon", None) or config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(0)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    if config.model_type != "gemma2":
        writer.add_rope_freq_base(rope["rope_theta"])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if config.model_type in ("gemma2", "gemma3_text", "phi3", "mistral"):
        writer.add_sliding_window(config.sliding_window or 0)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if hasattr(config, "num_experts_per_tok"):
        _experts(writer, config)
    _rope(writer, config, rope)


def _experts(writer: GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if hasattr(config, "shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def _rope(writer: GGUFWriter, config: PretrainedConfig, rope: Mapping[str, Any]) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    head = int(head * rope.get("partial_rotary_factor", 1))
    if config.model_type in ("llama", "mistral", "mixtral", "phi3", "nemotron"):
        writer.add_rope_dimension_count(head)
    if config.model_type == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    kind = rope["rope_type"]
    if kind in ("linear", "yarn", "longrope"):
        writer.add_rope_scaling_type(RopeScalingType(kind))
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        _yarn(writer, rope)
    if kind == "longrope":
        _longrope(writer, config, rope)
    if kind == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, head))


def _yarn(writer: GGUFWriter, rope: Mapping[str, Any]) -> None:
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    for name in ("beta_fast", "beta_slow"):
        if name in rope:
            getattr(writer, f"add_rope_scaling_yarn_{name}")(rope[name])
    if "attention_factor" in rope:
        writer.add_rope_scaling_yarn_attn_factor(rope["attention_factor"])


def _longrope(writer: GGUFWriter, config: PretrainedConfig, rope: Mapping[str, Any]) -> None:
    trained = config.original_max_position_embeddings
    stretch = config.max_position_embeddings / trained
    usual = math.sqrt(1 + math.log(stretch) / math.log(trained)) if stretch > 1 else 1.0
    writer.add_rope_scaling_attn_factors(rope.get("attention_factor", usual))
    for name in ("long", "short"):
        factors = np.array(rope[f"{name}_factor"], np.float32)
        writer.add_tensor(f"rope_factors_{name}.weight", factors)


def llama3_factors(rope: Mapping[str, Any], head: int) -> Any:
    """As the converter computes them, one a frequency."""
    context, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    found = []
    for place in range(0, head, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (place / head)
        if wavelength < context / high:
            found.append(1.0)
        elif wavelength > context / low:
            found.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def _tokenizer(writer: GGUFWriter, config: PretrainedConfig, vocabulary: Path) -> None:
    told = json.loads((vocabulary / "tokenizer.json").read_text())
    bpe, marks = told["model"], {entry["id"] for entry in told["added_tokens"]}
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if number in marks else 1 for number in range(len(tokens))])
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_bool("tokenizer.ggml.add_bos_token", val=True)
    writer.add_chat_template(tiny.CHAT_TEMPLATE)


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """By the names that the gguf package's table has for them, as the converter stores them."""
    config = model.config
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            place = name.removesuffix("gate_up_proj")
            both = zip(("gate_proj", "up_proj"), tensor.chunk(2, dim=1), strict=True)
            found |= {f"{place}{leaf}.weight": part for leaf, part in both}
        elif name.endswith("experts.down_proj"):
            found[f"{name}.weight"] = tensor
        elif name.endswith("shared_expert_gate.weight"):
            found[name] = tensor.flatten()
        elif name != "lm_head.weight" or not config.tie_word_embeddings:
            found[name] = _changed(name, tensor, config)
    return found


def _changed(name: str, tensor: Tensor, config: PretrainedConfig) -> Tensor:
    if config.model_type.startswith(("gemma", "nemotron")) and name.endswith("norm.weight"):
        return tensor + 1
    if ARCHITECTURES.get(config.model_type, config.model_type) == "llama":
        if ".q_proj." in name:
            return paired(tensor, config.num_attention_heads)
        if ".k_proj." in name:
            return paired(tensor, config.num_key_value_heads)
    return tensor


def paired(tensor: Tensor, heads: int) -> Tensor:
    """The converter's `permute`: both halves of a head's rows in turn."""
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape).contiguous()


def log_probabilities(model: PreTrainedModel, length: int = 200) -> Tensor:
    ids = torch.arange(length).remainder(301)[None] + 7
    with torch.no_grad():
        logits: Tensor = model(ids % model.config.vocab_size).logits
    return logits.log_softmax(-1)
