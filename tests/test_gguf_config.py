"""Files as llama.cpp's converter writes them compute what the model did; what would be lost is
refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType, dequantize, quantize
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)

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
    "qwen2_moe": ("qwen2_moe", {**tiny._OF_FAMILY["qwen2_moe"], "norm_topk_prob": False}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3_moe": ("qwen3_moe", {**tiny._OF_FAMILY["qwen3_moe"], "mlp_only_layers": []}),
    "gemma": ("gemma", {"head_dim": 32}),
    "gemma2": ("gemma2", {"head_dim": 32, "sliding_window": 16, "attn_logit_softcapping": 2.0,
                          "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {"head_dim": 32, "sliding_window": 16}),
    "gemma3 linear": ("gemma3_text", GEMMA3),
    "phi3": ("phi3", {"original_max_position_embeddings": 512, "sliding_window": 16}),
    "phi3 of which a part turns": ("phi3", {"rope_parameters": {
        "rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}}),
    "olmo2": ("olmo2", {}),
    "starcoder2": ("starcoder2", {}),
    "nemotron": ("nemotron", {}),
    "nemotron that turns whole": ("nemotron", {"partial_rotary_factor": 1.0}),
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


def test_blocks_of_codes_compute_what_they_decode_to(vocabulary: Path, tmp_path: Path) -> None:
    """Q8_0 and its likes: within what bfloat16 makes of the file's own precision."""
    model = built("qwen3", head_dim=32)
    path = tiny_gguf.write(
        tmp_path / "model.gguf", model, vocabulary, kind=GGMLQuantizationType.Q8_0
    )
    made = loaded(path)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                codes = quantize(parameter.numpy(), GGMLQuantizationType.Q8_0)
                decoded = torch.from_numpy(dequantize(codes, GGMLQuantizationType.Q8_0))
                parameter.copy_(decoded.to(torch.bfloat16))
    apart = tiny_gguf.log_probabilities(made) - tiny_gguf.log_probabilities(model)
    assert apart.abs().max() < 1e-4


def number(key: str, value: float) -> tiny_gguf.Edit:
    return lambda writer: writer.add_float32(key, value)


def whole(key: str, value: int) -> tiny_gguf.Edit:
    return lambda writer: writer.add_uint32(key, value)


def text(key: str, value: str) -> tiny_gguf.Edit:
    return lambda writer: writer.add_string(key, value)


def tensor(name: str, *values: float) -> tiny_gguf.Edit:
    return lambda writer: writer.add_tensor(name, np.array(values, np.float32))


LOST: dict[str, tuple[str, tiny_gguf.Edit, tuple[str, ...]]] = {
    "an unknown key": ("llama.resonance = 3", whole("llama.resonance", 3), ()),
    "another tool's key": ("mine.note = x", text("mine.note", "x"), ()),
    "clamped attention": ("llama.attention.clamp_kqv = 8",
                          number("llama.attention.clamp_kqv", 8), ()),
    "another scale": ("attention.scale = 0.5", number("llama.attention.scale", 0.5), ()),
    "soft caps": ("final_logit_softcapping = 30", number("llama.final_logit_softcapping", 30), ()),
    "fewer rotated": ("rope.dimension_count = 8",
                      lambda writer: (whole("llama.rope.dimension_count", 8)(writer),
                                      whole("llama.attention.key_length", 16)(writer))[0],
                      ("llama.rope.dimension_count", "llama.attention.key_length")),
    "values of another length": ("heads are 16", whole("llama.attention.value_length", 8),
                                 ("llama.attention.value_length",)),
    "an unknown scaling": ("rope.scaling.type dynamic",
                           text("llama.rope.scaling.type", "dynamic"), ()),
    "YaRN without a factor": ("rope.scaling.factor 0.0", text("llama.rope.scaling.type", "yarn"),
                              ()),
    "no base": ("rope.freq_base is 0.0", number("llama.rope.freq_base", 0),
                ("llama.rope.freq_base",)),
    "YaRN without a context": ("no llama.rope.scaling.original_context_length",
                               lambda writer: (writer.add_rope_scaling_factor(2.0),
                                               writer.add_rope_scaling_type(RopeScalingType.YARN))[1],
                               ()),
    "long factors without a context": ("no llama.rope.scaling.original_context_length",
                                       tensor("rope_factors_long.weight", *[2.0] * 8), ()),
    "factors of nobody's": ("factors of rope_freqs.weight are not Llama 3's",
                            tensor("rope_freqs.weight", 1, 5, 1, 3, 1, 9, 1, 2), ()),
    "too few factors": ("a factor for each of 8", tensor("rope_freqs.weight", 1, 2), ()),
    "a tensor more": ("it holds blk.1.attn_sinks.weight", tensor("blk.1.attn_sinks.weight", 1), ()),
    "no epsilon": ("no llama.attention.layer_norm_rms_epsilon", lambda _: None,
                   ("llama.attention.layer_norm_rms_epsilon",)),
    "a text for a number": ("llama.context_length is long", text("llama.context_length", "long"),
                            ("llama.context_length",)),
    "more blocks": ("block_count is 3", whole("llama.block_count", 3), ("llama.block_count",)),
    "another width": ("keys say", whole("llama.feed_forward_length", 96),
                      ("llama.feed_forward_length",)),
    "experts that are not there": ("experts are larger",
                                   lambda writer: (whole("llama.expert_count", 1 << 30)(writer),
                                                   whole("llama.expert_used_count", 2)(writer))[0],
                                   ()),
    "experts of which none is used": ("no llama.expert_used_count",
                                      whole("llama.expert_count", 4), ()),
    "a number beyond float32": ("attention.scale is 1e+300",
                                lambda writer: writer.add_float64("llama.attention.scale", 1e300),
                                ()),
    "a part": ("one of 3 parts", whole("split.count", 3), ()),
    "an adapter": ("general.type is adapter", text("general.type", "adapter"), ()),
    "padding beyond": ("padding_token_id is 9999", whole("tokenizer.ggml.padding_token_id", 9999),
                       ("tokenizer.ggml.padding_token_id",)),
}  # fmt: skip


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return built("llama")


@pytest.mark.parametrize("case", LOST)
def test_what_would_be_lost_is_refused_by_name(
    case: str, llama: PreTrainedModel, vocabulary: Path, tmp_path: Path
) -> None:
    said, edit, without = LOST[case]
    path = tiny_gguf.write(tmp_path / "model.gguf", llama, vocabulary, edit=edit, without=without)
    with pytest.raises(SourceError, match=f"^{path} cannot be used as a GGUF model: ") as told:
        converted(path)
    assert said in str(told.value) and "\n" not in str(told.value)
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []


def test_what_a_window_would_do_to_a_model_without_one_is_named(
    vocabulary: Path, tmp_path: Path
) -> None:
    path = tiny_gguf.write(
        tmp_path / "model.gguf", built("qwen2"), vocabulary,
        edit=whole("qwen2.attention.sliding_window", 64),
    )  # fmt: skip
    with pytest.raises(SourceError, match="sliding_window = 64, which would be lost"):
        gguf.model(path)


def test_an_architecture_that_is_not_converted_is_named(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "model.gguf", "mamba2")
    tensor("token_embd.weight", 1.0)(writer)
    with pytest.raises(SourceError, match="architecture mamba2, and llama, qwen2"):
        gguf.model(tiny_gguf.finish(writer))


def test_what_ends_an_answer_and_how_one_is_drawn_are_kept(
    llama: PreTrainedModel, vocabulary: Path, tmp_path: Path
) -> None:
    def edit(writer: GGUFWriter) -> None:
        whole("tokenizer.ggml.eot_token_id", 2)(writer)
        number("general.sampling.temp", 0.6)(writer)
        whole("general.sampling.top_k", 20)(writer)

    path = tiny_gguf.write(tmp_path / "model.gguf", llama, vocabulary, edit=edit)
    made = GenerationConfig.from_pretrained(converted(path))
    assert made.eos_token_id == [3, 2] and made.bos_token_id == 0
    assert (made.do_sample, made.temperature, made.top_k) == (True, 0.6, 20)


def test_keys_on_which_nothing_depends_are_passed_over(
    llama: PreTrainedModel, vocabulary: Path, tmp_path: Path
) -> None:
    def edit(writer: GGUFWriter) -> None:
        text("quantize.imatrix.file", "imatrix.dat")(writer)
        whole("general.quantization_version", 2)(writer)
        whole("split.count", 1)(writer)
        writer.add_array("general.tags", ["text-generation"])

    path = tiny_gguf.write(tmp_path / "model.gguf", llama, vocabulary, edit=edit)
    assert (converted(path) / "config.json").is_file()
