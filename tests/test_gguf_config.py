"""Files as llama.cpp's converter writes them compute what the model did; what would be lost is
refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from quant.errors import SourceError
from quant.intake import gguf, source
from tests import tiny, tiny_gguf

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0 + place / 10 for place in range(8)],
    "long_factor": [1.0 + place for place in range(8)],
}
GEMMA3 = {
    "head_dim": 32,
    "sliding_window": 16,
    "rope_parameters": {
        "full_attention": LINEAR,
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama with wide heads": ("llama", {"head_dim": 32}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama linear": ("llama", {"rope_parameters": LINEAR}),
    "llama of 3.1": ("llama", {"rope_parameters": LLAMA3}),
    "llama of 3.2": ("llama", {"rope_parameters": LLAMA3 | {"factor": 32.0}, "head_dim": 64}),
    "llama yarn": ("llama", {"rope_parameters": YARN | {"attention_factor": 1.25}}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2 yarn": ("qwen2", {"rope_parameters": YARN | {"beta_fast": 16.0, "beta_slow": 2.0}}),
    "qwen2_moe": ("qwen2_moe", tiny._OF_FAMILY["qwen2_moe"] | {"norm_topk_prob": False}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3_moe": ("qwen3_moe", tiny._OF_FAMILY["qwen3_moe"] | {"mlp_only_layers": []}),
    "gemma": ("gemma", {"head_dim": 32}),
    "gemma2": ("gemma2", {"head_dim": 32, "sliding_window": 16, "attn_logit_softcapping": 2.0,
                          "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {"head_dim": 32, "sliding_window": 16}),
    "gemma3 linear": ("gemma3_text", GEMMA3),
    "phi3": ("phi3", {"original_max_position_embeddings": 512, "sliding_window": 16}),
    "phi3 longrope": ("phi3", {"original_max_position_embeddings": 128, "rope_parameters": LONG}),
}  # fmt: skip


def built(family: str, **settings: Any) -> PreTrainedModel:
    """Weights that bfloat16 holds, so that a conversion loses nothing."""
    torch.manual_seed(0)
    layers = 6 if family == "gemma3_text" else 2
    config = CONFIG_MAPPING[family](
        **{
            "vocab_size": tiny.VOCAB,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "bos_token_id": 0,
            "eos_token_id": 3,
            "pad_token_id": 1,
            "tie_word_embeddings": family.startswith("gemma"),
            "initializer_range": 0.1,
            **settings,
        }
    )
    made = AutoModelForCausalLM.from_config(config)
    assert isinstance(made, PreTrainedModel)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            parameter.copy_(parameter.to(torch.bfloat16))
    return made.eval()


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    tiny.tokenizer(folder)
    return folder


def converted(path: Path) -> Path:
    return gguf.folder(path, path.parent / "cache", source.quiet)


def loaded(path: Path) -> PreTrainedModel:
    made = AutoModelForCausalLM.from_pretrained(converted(path), dtype=torch.float32)
    assert isinstance(made, PreTrainedModel)
    return made.eval()


@pytest.mark.parametrize("case", CASES)
def test_a_file_computes_what_its_model_did(case: str, vocabulary: Path, tmp_path: Path) -> None:
    family, settings = CASES[case]
    model = built(family, **settings)
    made = loaded(tiny_gguf.write(tmp_path / "model.gguf", model, vocabulary))
    assert type(made) is type(model)
    apart = tiny_gguf.log_probabilities(made) - tiny_gguf.log_probabilities(model)
    assert apart.abs().max() < 1e-4
