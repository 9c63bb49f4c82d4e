"""Every family of decoder-only models that is quantized and served, tiny and random.

Heads are of sizes that vLLM's attention takes on a CPU. Weights are large enough that positions,
windows and every layer are seen in what the model says.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from tests import tiny

HIDDEN, LAYERS, HEAD, POSITIONS = 128, 2, 32, 512
_ALL: Mapping[str, Any] = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HIDDEN // HEAD,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 0,
    "eos_token_id": 3,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}
_EXPERTS: Mapping[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
_ROUTED: Mapping[str, Any] = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
}
_LATENT: Mapping[str, Any] = {
    # All that vLLM's kernel for a CPU takes.
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 64,
    "qk_nope_head_dim": HEAD,
    "v_head_dim": HEAD,
    "num_key_value_heads": HIDDEN // HEAD,
    **_ROUTED,
}
_WINDOW: Mapping[str, Any] = {
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}
_GEMMA: Mapping[str, Any] = {
    "head_dim": HEAD,
    "query_pre_attn_scalar": HEAD,
    "tie_word_embeddings": True,  # all that vLLM has a place for
}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "cohere": {"tie_word_embeddings": True},
    "cohere2": {"tie_word_embeddings": True, **_WINDOW},
    "deepseek_v2": {"n_group": 1, "topk_group": 1, **_LATENT},
    "deepseek_v3": {
        "n_group": 2,
        "topk_group": 1,
        # As the hub's config.json has them; transformers keeps them, and writes none of its own.
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        **_LATENT,
    },
    "ernie4_5": {"head_dim": HEAD},
    "exaone4": _WINDOW,
    "falcon": {"tie_word_embeddings": True},
    "gemma": {"head_dim": HEAD, "tie_word_embeddings": True},
    "gemma2": {**_GEMMA, **_WINDOW},
    "gemma3_text": {**_GEMMA, **_WINDOW},
    "glm": {"head_dim": HEAD},
    "glm4": {"head_dim": HEAD},
    "glm4_moe": {"head_dim": HEAD, **_ROUTED},
    "gpt_bigcode": {
        "n_positions": POSITIONS,
        "n_embd": HIDDEN,
        "n_layer": LAYERS,
        "n_head": HIDDEN // HEAD,
        "n_inner": 2 * HIDDEN,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "gpt_neox": {},
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.25,
    },
    "helium": {"head_dim": HEAD},
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "llama": {},
    "mistral": {"sliding_window": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": _WINDOW,
    "olmoe": _EXPERTS,
    "opt": {
        "ffn_dim": 2 * HIDDEN,
        "word_embed_proj_dim": HIDDEN,
        "tie_word_embeddings": True,
    },
    "persimmon": {},
    "phi": {},
    "phi3": {"original_max_position_embeddings": POSITIONS},
    "qwen2": {},
    "qwen2_moe": {
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 96,
        **_EXPERTS,
    },
    "qwen3": {"head_dim": HEAD},
    "qwen3_moe": {
        "head_dim": HEAD,
        "moe_intermediate_size": 96,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
        **_EXPERTS,
    },
    "seed_oss": {"head_dim": HEAD},
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {"use_qkv_bias": True},
    "starcoder2": {"sliding_window": 16, "tie_word_embeddings": True},
}


def model(family: str, *, seed: int = 0) -> PreTrainedModel:
    """Float32."""
    torch.manual_seed(seed)
    known = CONFIG_MAPPING[family]()
    # vLLM believes whatever stands in config.json, be it a name that the family does not have.
    common = {name: value for name, value in _ALL.items() if hasattr(known, name)}
    config = CONFIG_MAPPING[family](**{**common, **FAMILIES.get(family, {})})
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            else:
                parameter.normal_(std=0.1)
    return made.eval()


def folder(place: Path, family: str) -> Path:
    """The model in bfloat16 and its tokenizer, as a trainer saves them."""
    place.mkdir(parents=True)
    tiny.tokenizer(place)
    model(family).to(torch.bfloat16).save_pretrained(place)
    return place
