"""Tiny random models, tokenizers and LoRA adapters, written as a trainer would leave them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3")
BOS, EOS, TURN, END = "<s>", "</s>", "<|im_start|>", "<|im_end|>"
VOCAB = 320
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n'"
    " + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TEXT = (
    "the quick brown fox jumps over the lazy dog and runs through the green forest at night",
    "what is the capital of france? the capital of france is paris, a city on the seine.",
    "def add(left, right): return left + right  # a function of two numbers",
)
_OF_FAMILY: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "mistral": {"sliding_window": 16},
    "gemma3_text": {"head_dim": 32, "sliding_window": 16, "sliding_window_pattern": 2},
    "phi3": {"original_max_position_embeddings": 512},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 96,
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "head_dim": 32,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
}
# Vision towers of two blocks, as many as the language models have.
_VISION: Mapping[str, Mapping[str, Any]] = {
    "qwen2_5_vl": {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": 64,
        "num_heads": 2,
        "intermediate_size": 64,
        "patch_size": 4,
    },
    "llava": {
        "model_type": "clip_vision_model",
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "projection_dim": 32,
    },
    "gemma3": {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    },
    "qwen3_vl": {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": 64,
        "num_heads": 2,
        "intermediate_size": 64,
        "patch_size": 4,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    },
}
_BEHIND: Mapping[str, Mapping[str, Any]] = {
    "qwen2_5_vl": {
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [2, 3, 3],
            "rope_theta": 1e4,
        }
    },
    "llava": {"model_type": "llama"},
    "gemma3": {"head_dim": 32, "sliding_window": 16, "sliding_window_pattern": 2},
    "qwen3_vl": {
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
            "rope_theta": 1e4,
        },
    },
}
SEEING = ("qwen2_5_vl", "llava", "gemma3")
_READ_NORMS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj")


def tokenizer(folder: Path, *, chat: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCAB tokens that puts BOS first, saved into `folder`."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        _TEXT,
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=[BOS, EOS, TURN, END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    raw.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, raw.token_to_id(BOS))]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=BOS, eos_token=END, pad_token=EOS, unk_token=EOS
    )
    if chat:
        made.chat_template = CHAT_TEMPLATE
    made.save_pretrained(folder)
    return made


def model(
    family: str = "llama", *, hidden: int = 64, layers: int = 2, tied: bool = False, seed: int = 0
) -> PreTrainedModel:
    """Float32, with weights large enough that layers matter and norms that are not all ones."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 3,
        "pad_token_id": 1,
        "tie_word_embeddings": tied,
        "initializer_range": 0.05,
        **_OF_FAMILY.get(family, {}),
    }
    torch.manual_seed(seed)
    made = _built(family, settings)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            assert parameter.isfinite().all(), name
    return made.eval()


def _built(family: str, settings: dict[str, Any]) -> PreTrainedModel:
    config, built = CONFIG_MAPPING[family], AutoModelForCausalLM
    if family not in _VISION:
        made: PreTrainedModel = built.from_config(config(**settings))
        return made
    tied = settings.pop("tie_word_embeddings")
    parts = {"text_config": {**settings, **_BEHIND[family]}, "vision_config": _VISION[family]}
    marks = {"image_token_id" if family.startswith("qwen") else "image_token_index": 5}
    seeing = config(**parts, **marks, tie_word_embeddings=tied)
    made = AutoModelForImageTextToText.from_config(seeing)
    assert isinstance(made, PreTrainedModel)
    return made


def model_folder(
    folder: Path,
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.bfloat16,
    shard: str | None = None,
    chat: bool = True,
    **shape: Any,
) -> Path:
    """A model and its tokenizer on disk; `shard` such as "50KB" splits it; `shape` as `model`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer(folder, chat=chat)
    model(family, **shape).to(dtype).save_pretrained(folder, max_shard_size=shard or "1GB")
    return folder


def plant_outliers(folder: Path, *, channels: Sequence[int] = (3, 17, 40), by: float = 32) -> None:
    """Norms put out some channels `by` times as large, what reads them takes as much less.

    The model computes what it did, as trained models do whose activations are hard to round.
    """
    held = load_file(folder / "model.safetensors")
    gemma = int(any("pre_feedforward" in name for name in held))  # its norms multiply by 1 + weight
    second = "pre_feedforward_layernorm" if gemma else "post_attention_layernorm"
    for name, tensor in held.items():
        owner = name.split(".")[-2]
        if owner in ("input_layernorm", second):
            tensor[list(channels)] = (tensor[list(channels)] + gemma) * by - gemma
        elif owner in _READ_NORMS and name.endswith("weight"):
            tensor[:, list(channels)] /= by
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def adapter_folder(
    folder: Path, base: Path, *, targets: Any = ("q_proj", "v_proj", "down_proj"), **lora: Any
) -> Path:
    """A random PEFT LoRA on the model in `base`, saved by PEFT; `lora` as peft.LoraConfig."""
    seed = lora.pop("seed", 0)
    parent = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, **lora}
    torch.manual_seed(seed)
    config = LoraConfig(target_modules=list(targets), task_type="CAUSAL_LM", **settings)
    get_peft_model(parent, config).save_pretrained(folder)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON object on disk; a change of None removes the key."""
    content = {**json.loads(path.read_text("utf-8")), **changes}
    kept = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(kept), "utf-8")
