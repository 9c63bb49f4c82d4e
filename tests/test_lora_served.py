"""`quant.lora.served`: what a server is told to adapt, and that all else is refused everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.interfaces import supports_lora

from quant.errors import AdapterError
from quant.lora import export, served, suitability
from serve import engine_args
from serve.adapters.sources import Sources
from serve.adapters.store import Store, base_of
from serve.engine_args import Facts
from serve.errors import AdapterRefused
from serve.settings import Settings
from tests import tiny, variants
from tests.lora import write_lora
from tests.test_export import Heard

GPTQ, INT8 = {"quant_method": "gptq"}, {"quant_method": "compressed-tensors"}
EXPERT = "model.layers.1.mlp.experts.5.up_proj"


def told(folder: Path, **config: Any) -> tuple[str, ...]:
    (folder / "config.json").write_text(json.dumps({"vocab_size": 320, **config}))
    return served.targets(folder)


@pytest.mark.parametrize(
    ("architecture", "more"),
    [
        ("LlamaForCausalLM", ("lm_head",)),
        ("Qwen3MoeForCausalLM", ("lm_head", "gate")),
        ("Qwen2MoeForCausalLM", ("gate",)),
        ("Qwen2ForCausalLM", ()),
        ("MistralForCausalLM", ()),
        ("LlavaForConditionalGeneration", ()),
    ],
)
def test_heads_and_routers_are_adapted_where_that_was_measured(
    tmp_path: Path, architecture: str, more: tuple[str, ...]
) -> None:
    assert told(tmp_path, architectures=[architecture]) == (*served.LAYERS, *more)


@pytest.mark.parametrize(
    "config",
    [
        {"tie_word_embeddings": True},
        {"vocab_size": 262144},
        {"quantization_config": GPTQ | {"lm_head": True}},
        {"quantization_config": INT8 | {"ignore": ["model.layers.0.mlp.up_proj"]}},
    ],
)
def test_a_head_that_vllm_cannot_wrap_is_left_alone(tmp_path: Path, config: Any) -> None:
    assert told(tmp_path, architectures=["LlamaForCausalLM"], **config) == served.LAYERS


@pytest.mark.parametrize(
    "section", [None, GPTQ, GPTQ | {"lm_head": False}, INT8 | {"ignore": ["lm_head"]}]
)
def test_a_plain_head_beside_quantized_layers_is_adapted(tmp_path: Path, section: Any) -> None:
    found = told(tmp_path, architectures=["LlamaForCausalLM"], quantization_config=section)
    assert "lm_head" in found


@pytest.mark.parametrize(
    "module",
    [
        "lm_head",
        "model.layers.0.mlp.gate",
        "model.layers.11.self_attn.q_proj",
        "model.layers.0.mlp.shared_expert.down_proj",
        "model.language_model.layers.0.self_attn.v_proj",
        "language_model.model.layers.0.mlp.up_proj",
    ],
)
def test_what_is_served(module: str) -> None:
    assert served.is_served(module, served.ANYWHERE)
    served.check(Path("legal"), [module], served.ANYWHERE)  # which raises, for any other


@pytest.mark.parametrize(
    "module",
    [
        "model.embed_tokens",
        "model.layers.0.mlp.experts.3.down_proj",
        "model.layers.0.block_sparse_moe.experts.0.w1",
        "model.layers.0.mlp.experts",
        "model.layers.0.mlp.shared_expert_gate",
        "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
        "visual.blocks.0.mlp.gate_proj",
        "transformer.h.0.attn.c_attn",
        "q_proj",
    ],
)
def test_what_is_left_out_is_refused_by_name(module: str) -> None:
    modules = [module, "model.layers.0.self_attn.o_proj"]
    with pytest.raises(AdapterError, match="adapter merge") as refusal:
        served.check(Path("legal"), modules, served.ANYWHERE)
    assert refusal.value.field == module and "o_proj" not in str(refusal.value)


def test_many_are_counted() -> None:
    modules = [f"model.layers.{place}.mlp.experts.0.w1" for place in range(5)]
    with pytest.raises(AdapterError, match=r"experts\.0\.w1 and 3 more;"):
        served.check(Path("legal"), modules, served.LAYERS)


def test_every_door_refuses_an_adapter_on_an_expert(tmp_path: Path) -> None:
    base = variants.base_folder(tmp_path / "base", "qwen3_moe")
    shapes = {"model.layers.0.self_attn.q_proj": (128, 64), EXPERT: (96, 64)}
    lora = write_lora(tmp_path / "lora", shapes)
    for judged in (suitability.judge(lora, base), suitability.judge(lora, None)):
        assert judged.merge.works and not judged.swap.works
        assert EXPERT in judged.swap.reason and "quantize --adapter" in judged.swap.reason
    with pytest.raises(AdapterError, match="leave out"):
        export.run(export.Order(lora, base, tmp_path / "out"), Heard())
    with pytest.raises(AdapterRefused, match="leave out") as refusal:
        Store(tmp_path / "store", base_of(base, 16), Sources()).take_in(str(lora))
    assert refusal.value.param == EXPERT and not (tmp_path / "out").exists()


def test_every_door_refuses_an_adapter_on_a_stack_of_experts(tmp_path: Path) -> None:
    base = variants.base_folder(tmp_path / "base", "qwen3_moe")
    stacks = ["gate_up_proj", "down_proj"]
    lora, _ = variants.trained(
        tmp_path / "lora", base, targets=("q_proj",), target_parameters=stacks
    )
    for judged in (suitability.judge(lora, base), suitability.judge(lora, None)):
        assert judged.merge.works and not judged.swap.works
        assert judged.targets == {"q_proj": 2, "experts": 2}  # its first block is dense
        assert "stacks of experts" in judged.swap.reason and "adapter merge" in judged.swap.reason
    with pytest.raises(AdapterError, match="adapter merge"):
        export.run(export.Order(lora, base, tmp_path / "out"), Heard())
    with pytest.raises(AdapterRefused, match=r"stacks of experts.*adapter merge") as refusal:
        Store(tmp_path / "store", base_of(base, 16), Sources()).take_in(str(lora))
    assert refusal.value.param == "target_parameters"


def test_the_engine_is_told_what_the_store_takes(tmp_path: Path) -> None:
    base = tiny.model_folder(tmp_path / "base")
    flags = engine_args.flags(
        Settings(artifact=base), Facts(on_cpu=True, cpu_flags=frozenset(), quantization=None)
    )
    named = flags[flags.index("--lora-target-modules") + 1 :]
    adapted = base_of(base, 16).adapted
    assert tuple(named[: len(adapted)]) == adapted and "lm_head" in adapted


@pytest.mark.parametrize("name", ["Falcon", "StableLm", "Llama", "OPT"])
def test_adapters_are_off_exactly_where_vllms_code_takes_none(name: str, tmp_path: Path) -> None:
    architecture = f"{name}ForCausalLM"
    model = ModelRegistry._try_load_model_cls(architecture)
    assert model is not None
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    assert bool(served.targets(tmp_path)) == supports_lora(model)
    assert engine_args.inspect(Settings(artifact=tmp_path)).adapted == supports_lora(model)
