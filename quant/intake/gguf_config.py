"""A GGUF file's metadata as a transformers configuration: every key is used, or refused by name.

Knows what llama.cpp's converter writes for the architectures in the table below, and what it means
to llama.cpp that a key is not there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from quant.intake import architecture, gguf_rope, gguf_tokenizer
from quant.intake.gguf_keys import Keys
from quant.intake.gguf_tensors import DTYPE, Layout


class Known(NamedTuple):
    """`model_type` is transformers' name, `epsilon` its name for what `norm` says; `fixed` is what
    llama.cpp does whatever a file says."""

    model_type: str
    layout: Layout = Layout()
    fixed: Mapping[str, Any] = {}
    norm: str = ".attention.layer_norm_rms_epsilon"
    epsilon: str = "rms_norm_eps"


_SHIFTED = Layout(shift=1.0)
_MEAN = ".attention.layer_norm_epsilon"
KNOWN = {
    "llama": Known("llama", Layout(turned=True)),
    "qwen2": Known("qwen2"),
    "qwen2moe": Known("qwen2_moe", fixed={"norm_topk_prob": False}),
    "qwen3": Known("qwen3"),
    "qwen3moe": Known("qwen3_moe", fixed={"norm_topk_prob": True}),
    "gemma": Known("gemma", _SHIFTED),
    "gemma2": Known("gemma2", _SHIFTED),
    "gemma3": Known("gemma3_text", _SHIFTED),
    "phi3": Known("phi3"),
    "olmo2": Known("olmo2"),
    "starcoder2": Known("starcoder2", norm=_MEAN, epsilon="norm_epsilon"),
    "nemotron": Known("nemotron", _SHIFTED, norm=_MEAN, epsilon="norm_eps"),
}
# What tells where a file comes from and how it was made, and llama.cpp's own samplers.
HARMLESS = ("general.", "quantize.", "imatrix.", "split.")
_SIZES = {
    ".context_length": "max_position_embeddings",
    ".block_count": "num_hidden_layers",
    ".embedding_length": "hidden_size",
    ".feed_forward_length": "intermediate_size",
    ".attention.head_count": "num_attention_heads",
}
_EXPERTS = {
    ".expert_count": "num_experts",
    ".expert_used_count": "num_experts_per_tok",
    ".expert_feed_forward_length": "moe_intermediate_size",
    ".expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
_CAPS = {
    ".attn_logit_softcapping": "attn_logit_softcapping",
    ".final_logit_softcapping": "final_logit_softcapping",
}
# What a file may only say so: whatever else it says, the model here would not do.
_ONLY: Mapping[str, tuple[float, ...]] = {
    ".attention.causal": (1,),
    ".attention.clamp_kqv": (0,),
    ".attention.max_alibi_bias": (0,),
    ".pooling_type": (0,),
    ".expert_gating_func": (1,),
    ".expert_weights_scale": (0, 1),
    ".leading_dense_block_count": (0,),
    ".nextn_predict_layers": (0,),
    ".logit_scale": (1,),
    ".residual_scale": (1,),
    ".embedding_scale": (1,),
}
_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
_BIASES = {
    "attention_bias": "blk.0.attn_q.bias",
    "mlp_bias": "blk.0.ffn_up.bias",
    "use_bias": "blk.0.attn_q.bias",
}
_WINDOWED = ("llama", "gemma2", "gemma3", "phi3")
_PATTERN = ".attention.sliding_window_pattern"
_KINDS = {True: "sliding_attention", False: "full_attention"}
_LOCAL_THETA = 10_000.0
# Attention is scaled by this width in all of Gemma 2 and 3 but the models of so many layers.
_SCALAR, _BY_HIDDEN = 256, {"gemma2": 46, "gemma3": 62}


def config(keys: Keys) -> PretrainedConfig:
    """Of the model in a file. SourceError names what the file says that would be lost."""
    known = KNOWN.get(keys.architecture)
    if known is None:
        raise keys.header.refused(
            f"it is of architecture {keys.architecture}, and {', '.join(KNOWN)} are converted:"
            " give the model's Hugging Face folder"
        )
    _check_whole(keys)
    settings = {
        **_shape(keys),
        **_caps(keys),
        **known.fixed,
        known.epsilon: keys.number(known.norm),
    }
    settings |= _experts(keys, settings) | _attention(keys, settings)
    settings |= _rope(keys, settings)
    settings |= {name: gguf_tokenizer.token_id(keys, token) for name, token in _IDS.items()}
    model_type = _model_type(known, settings)
    head = settings["head_dim"]
    _fit(keys, model_type, settings)
    try:
        made = CONFIG_MAPPING[model_type](
            **settings,
            tie_word_embeddings="output.weight" not in keys.header.tensors,
            architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]],
            dtype=DTYPE,
        )
    except (ValueError, TypeError, LookupError, StrictDataclassError) as fault:
        raise keys.header.refused(" ".join(str(fault).split())[:300]) from fault
    _check_rotary(keys, made, head)
    return made


def _check_whole(keys: Keys) -> None:
    kind = keys.text("general.type", "model")
    if kind != "model":
        raise keys.header.refused(f"its general.type is {kind}, not model")
    if (parts := keys.whole("split.count", 0)) > 1:
        raise keys.header.refused(
            f"it is one of {parts} parts: join them with llama-gguf-split --merge"
        )
    keys.pass_over(".tensor_data_layout")  # llama.cpp knows one
    for key, allowed in _ONLY.items():
        keys.pass_over(key)
        said = keys.header.metadata.get(keys.full(key), allowed[0])
        if said not in allowed:
            raise keys.header.refused(f"it says {keys.full(key)} = {said}, which would be lost")


def _model_type(known: Known, settings: dict[str, Any]) -> str:
    """Files of architecture `llama` are Mixtral's where they have experts, and Mistral's where they
    have a window."""
    if known.model_type != "llama":
        return known.model_type
    if "num_experts" in settings:
        settings["num_local_experts"] = settings.pop("num_experts")
        return "mixtral"
    return "mistral" if "sliding_window" in settings else "llama"


def _shape(keys: Keys) -> dict[str, Any]:
    settings: dict[str, Any] = {n: keys.whole(key, least=1) for key, n in _SIZES.items()}
    tensors = keys.header.tensors
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    if len(blocks) != settings["num_hidden_layers"]:
        raise keys.header.refused(
            f"{keys.full('.block_count')} is {settings['num_hidden_layers']}, and it holds tensors"
            f" of {len(blocks)} blocks"
        )
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise keys.header.refused("it lacks token_embd.weight")
    rows = embedding.shape[0]
    if keys.whole(".vocab_size", rows) != rows:
        raise keys.header.refused(f"its vocab_size is not that of its {rows} embeddings")
    if (count := len(keys.texts("tokenizer.ggml.tokens"))) > rows:
        raise keys.header.refused(f"it has {count} tokens, and {rows} embeddings")
    heads = settings["num_attention_heads"]
    shared = settings["num_key_value_heads"] = keys.whole(
        ".attention.head_count_kv", heads, least=1
    )
    if heads % shared:
        raise keys.header.refused(f"{shared} heads of keys do not divide {heads} of queries")
    return {**settings, "vocab_size": rows, "head_dim": _head(keys, settings)}


def _head(keys: Keys, settings: Mapping[str, Any]) -> int:
    usual = settings["hidden_size"] // settings["num_attention_heads"]
    if keys.architecture == "llama":  # whose files stated it so before they had a key for it
        usual = keys.whole(".rope.dimension_count", usual)
    head = keys.whole(".attention.key_length", usual)
    if head < 2 or head % 2 or keys.whole(".attention.value_length", head) != head:
        raise keys.header.refused(f"its heads are {head} wide, and as many values do not fit")
    return head


def _caps(keys: Keys) -> dict[str, Any]:
    """To llama.cpp a cap of 0 is none."""
    return {name: keys.number(key) or None for key, name in _CAPS.items() if key in keys}


def _experts(keys: Keys, settings: Mapping[str, Any]) -> dict[str, Any]:
    told = {name: keys.whole(key) for key, name in _EXPERTS.items() if key in keys}
    found = {name: count for name, count in told.items() if count}
    if not found:
        return {}
    keys.whole(".expert_used_count", least=1)
    normed = settings.get("norm_topk_prob", True)
    if keys.flag(".expert_weights_norm", normed) != normed:
        raise keys.header.refused("its expert_weights_norm is not what its architecture does")
    width = found.get("moe_intermediate_size", settings["intermediate_size"])
    largest = max(math.prod(place.shape) for place in keys.header.tensors.values())
    if found.get("num_experts", 0) * width * settings["hidden_size"] > largest:
        raise keys.header.refused("its experts are larger than any of its tensors")
    return found


def _attention(keys: Keys, settings: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    window, depth = keys.whole(".attention.sliding_window", 0), settings["num_hidden_layers"]
    if window and keys.architecture not in _WINDOWED:
        raise keys.header.refused(
            f"it says attention.sliding_window = {window}, which would be lost"
        )
    if window:
        found["sliding_window"] = window
    scalar: float = settings["head_dim"]
    if keys.architecture in _BY_HIDDEN:
        if _PATTERN in keys:
            found["layer_types"] = _layer_types(keys, depth)
        elif not window and keys.architecture == "gemma3":
            found["layer_types"] = [_KINDS[False]] * depth
        by_hidden = depth == _BY_HIDDEN[keys.architecture]
        scalar = (
            settings["hidden_size"] // settings["num_attention_heads"] if by_hidden else _SCALAR
        )
    stated = abs(keys.number(".attention.scale", 0.0)) or scalar**-0.5
    if keys.architecture in _BY_HIDDEN:
        found["query_pre_attn_scalar"] = round(stated**-2)
    elif not math.isclose(stated, scalar**-0.5, rel_tol=1e-5):
        raise keys.header.refused(f"it says attention.scale = {stated}, which would be lost")
    return found


def _layer_types(keys: Keys, depth: int) -> list[str]:
    if not isinstance(keys.header.metadata[keys.full(_PATTERN)], list):
        every = keys.whole(_PATTERN, least=1)
        return [_KINDS[(layer + 1) % every > 0] for layer in range(depth)]
    local = keys.flags(_PATTERN)
    if len(local) != depth:
        raise keys.header.refused(
            f"{keys.full(_PATTERN)} has {len(local)} entries for {depth} blocks"
        )
    return [_KINDS[sliding] for sliding in local]


def _rope(keys: Keys, settings: Mapping[str, Any]) -> dict[str, Any]:
    found = gguf_rope.parameters(keys, settings["head_dim"])
    if keys.architecture == "gemma3":
        local = keys.number(".rope.freq_base_swa", _LOCAL_THETA)
        near = {"rope_type": "default", "rope_theta": local}
        return {"rope_parameters": {"full_attention": found, "sliding_attention": near}}
    if keys.architecture != "phi3":
        return {"rope_parameters": found}
    context = settings["max_position_embeddings"]
    trained = keys.whole(".rope.scaling.original_context_length", context)
    return {"rope_parameters": found, "original_max_position_embeddings": trained}


def _fit(keys: Keys, model_type: str, settings: dict[str, Any]) -> None:
    """Leaves only what the configuration knows, in place; SourceError for anything lost so."""
    known = CONFIG_MAPPING[model_type]()
    usual = settings["hidden_size"] // settings["num_attention_heads"]
    if not hasattr(known, "head_dim") and settings["head_dim"] == usual:
        del settings["head_dim"]
    lost = sorted(name for name in settings if name != "head_dim" and not hasattr(known, name))
    if lost:
        raise keys.header.refused(
            f"it says {', '.join(f'{n} = {settings[n]}' for n in lost)}, which {model_type} does"
            " not know"
        )
    for name, tensor in _BIASES.items():
        if hasattr(known, name):
            settings[name] = tensor in keys.header.tensors


def _check_rotary(keys: Keys, made: PretrainedConfig, head: int) -> None:
    """That the model rotates as many numbers of a head as the file says, be it all of them."""
    rotated = keys.whole(".rope.dimension_count", head)
    for name, buffer in architecture.hollow(made).named_buffers():
        if name.endswith("inv_freq") and 2 * buffer.numel() != rotated:
            raise keys.header.refused(
                f"it says rope.dimension_count = {rotated}, and {made.model_type} rotates"
                f" {2 * buffer.numel()} numbers of a head"
            )
