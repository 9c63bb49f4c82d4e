"""`quant.formats`: what config.json says of each layer, as stock vLLM's own rules read it."""

from __future__ import annotations

import random
from copy import deepcopy
from typing import Any

import pytest
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer
from vllm.model_executor.layers.quantization.utils.gptq_utils import (
    get_dynamic_override,
    is_layer_gptq_quantized,
    override_config,
)
from vllm.model_executor.models import ModelRegistry

from quant import formats
from quant.errors import ArtifactError
from quant.formats import FULL, INT8, Format
from quant.recipe import Scheme

BLOCKS = 13  # one number begins others: 1, 10, 11, 12
ATTENTION, GATED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
UNITS = (("self_attn", ATTENTION), ("self_attn", ("o_proj",)), ("mlp", GATED),
         ("mlp", ("down_proj",)))  # fmt: skip
FUSED = {"qkv_proj": ATTENTION, "gate_up_proj": GATED}
GROUPED = [Format(4, 128), Format(4, 64), Format(4, 32), Format(8, 128), FULL]


def drawn(choices: list[Format], seed: int) -> dict[str, Format]:
    """A format for each unit of layers that read the same input."""
    draw = random.Random(seed)
    plan: dict[str, Format] = {}
    for block in range(BLOCKS):
        for parent, leaves in UNITS:
            form = draw.choice(choices)
            plan |= {f"model.layers.{block}.{parent}.{leaf}": form for leaf in leaves}
    return plan


def loaded_as(name: str) -> str:
    """The layer that vLLM loads a checkpoint's layer into."""
    parent, _, leaf = name.rpartition(".")
    fused = next((fused for fused, parts in FUSED.items() if leaf in parts), leaf)
    return f"{parent}.{fused}"


def vllm_reads(section: dict[str, Any], name: str) -> Format:
    """The format that vLLM's gptq loader gives the module `name`."""
    config = AutoGPTQConfig.from_config(deepcopy(section))
    if get_dynamic_override(config, layer_name=name) == False:  # noqa: E712 - None is another answer
        return FULL
    override_config(config, prefix=name)
    assert config.is_sym and not config.desc_act
    assert config.quant_type.size_bits == config.weight_bits
    return Format(config.weight_bits, config.group_size)


@pytest.mark.parametrize("seed", range(3))
def test_vllm_reads_the_format_of_every_layer_and_of_what_it_fuses(seed: int) -> None:
    plan = drawn(GROUPED, seed)
    section = formats.section("w4a16", plan)
    assert set(plan.values()) == set(GROUPED)
    for name, form in plan.items():
        assert vllm_reads(section, name) == form
        assert vllm_reads(section, loaded_as(name)) == form
        assert formats.of_layer(section, name) == form
        assert formats.of_layer(section, loaded_as(name)) == form


def test_what_is_no_layer_of_a_block_matches_no_rule() -> None:
    section = formats.section("w4a16", drawn(GROUPED, 0))
    config = AutoGPTQConfig.from_config(section)
    for name in ("lm_head", "model.layers.130.mlp.down_proj", "model.layers.1.mlp.down_proj_b"):
        assert get_dynamic_override(config, layer_name=name) is None


@pytest.mark.parametrize("seed", range(3))
def test_vllm_leaves_out_whole_fused_layers_of_w8a8(seed: int) -> None:
    plan = drawn([INT8, FULL], seed)
    section = formats.section("w8a8", plan)
    config = CompressedTensorsConfig.from_config(deepcopy(section))
    assert config.ignore[0] == "lm_head"
    for name, form in plan.items():
        skipped = should_ignore_layer(
            loaded_as(name), config.ignore, {fused: list(parts) for fused, parts in FUSED.items()}
        )
        assert skipped == (form == FULL)
        assert formats.of_layer(section, name) == form


IN_FILES = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
# GLM-4's, where the parts are looked up; Phi-3's; a model that vLLM knows no fused layers of.
MAPPINGS: tuple[dict[str, list[str]], ...] = (
    {k: list(v) for k, v in FUSED.items()},
    {k: [k] for k in FUSED},
    {},
)


def in_files(forms: dict[str, Format]) -> dict[str, Format]:
    """Of layers that lie fused in the files, by their names inside a block."""
    return {
        f"model.layers.{place}.{name}": form for place in (0, 1) for name, form in forms.items()
    }


@pytest.mark.parametrize("mapping", MAPPINGS, ids=["parts", "whole", "unknown"])
def test_what_lies_fused_in_the_files_is_quantized_whatever_vllm_thinks_it_fuses(
    mapping: dict[str, list[str]],
) -> None:
    mixed = {**dict.fromkeys(IN_FILES, Format(4, 64)), "mlp.down_proj": FULL}
    for forms in (dict.fromkeys(IN_FILES, Format(4, 64)), mixed):
        plan = in_files(forms)
        config = AutoGPTQConfig.from_config(formats.section("w4a16", plan))
        config.maybe_update_config("no folder is looked at")
        for name, form in plan.items():
            there = is_layer_gptq_quantized(name, config.modules_in_block_to_quantize, mapping)
            left = get_dynamic_override(config, layer_name=name) == False  # noqa: E712 - None differs
            assert (there and not left) == (form != FULL), name
        for other in ("lm_head", "model.layers.0.mlp.gate"):
            assert not is_layer_gptq_quantized(other, config.modules_in_block_to_quantize, mapping)


@pytest.mark.parametrize("mapping", MAPPINGS, ids=["parts", "whole", "unknown"])
def test_what_lies_fused_in_the_files_is_left_out_of_w8a8_whole(
    mapping: dict[str, list[str]],
) -> None:
    plan = in_files({name: FULL if "_up_" in name else INT8 for name in IN_FILES})
    ignore = formats.section("w8a8", plan)["ignore"]
    for name, form in plan.items():
        assert should_ignore_layer(name, ignore, mapping) == (form == FULL), name


def test_layers_that_lie_apart_in_the_files_need_no_list() -> None:
    """vLLM finds those by itself, and artifacts stay as they were."""
    assert "modules_in_block_to_quantize" not in formats.section("w4a16", drawn(GROUPED, 0))


# Where the files have layers that predict further tokens -> the names that vLLM builds them under.
DRAFTS = {
    "model.layers.13": "model.layers.13",  # GLM-4.5, DeepSeek-V3
    "mtp": "mtp.layers.0",  # Qwen3-Next, EXAONE
    "model.mtp_layers": "model.layers.13",  # MiMo
}


@pytest.mark.parametrize(("drafts", "home"), DRAFTS.items())
def test_layers_that_predict_further_tokens_are_left_as_they_are(drafts: str, home: str) -> None:
    plan = drawn([Format(4, 64)], 0)
    section = formats.section("w4a16", plan, drafts=[drafts])
    ignore = formats.section("w8a8", dict.fromkeys(plan, INT8), drafts=[drafts])["ignore"]
    parts = {fused: list(parts) for fused, parts in FUSED.items()}
    inside = ("self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.experts", "mlp.experts.0.down_proj")
    for name in [f"{home}.{layer}" for layer in inside] + [f"{drafts}.fc"] * (drafts == "mtp"):
        assert vllm_reads(section, name) == FULL
        assert should_ignore_layer(name, ignore, parts), name
    for name in (*plan, *map(loaded_as, plan)):
        assert vllm_reads(section, name) == Format(4, 64)
        assert not should_ignore_layer(name, ignore, parts), name


@pytest.mark.parametrize("home", ["gpt_neox.layers", "transformer.h", "model.decoder.layers"])
def test_rules_hold_for_blocks_that_vllm_has_in_another_place(home: str) -> None:
    """Its Transformers backend has all of them behind `model.`."""
    plan = {f"{home}.{place}.mlp.up": Format(4, 64) for place in range(3)}
    plan[f"{home}.2.mlp.up"] = Format(8, 64)
    section, moved = formats.section("w4a16", plan), f"model.{home.rpartition('.')[2]}"
    for name, form in plan.items():
        assert vllm_reads(section, name) == form
        assert vllm_reads(section, name.replace(home, moved)) == form


@pytest.mark.parametrize(
    "architecture",
    ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM",
     "Gemma3ForCausalLM"],
)  # fmt: skip
def test_vllm_fuses_what_we_think_it_fuses(architecture: str) -> None:
    model = ModelRegistry._try_load_model_cls(architecture)
    assert model is not None
    assert {k: tuple(v) for k, v in model.packed_modules_mapping.items()} == FUSED


@pytest.mark.parametrize(("scheme", "bits"), [("w4a16", 4), ("w8a16", 8)])
def test_one_format_for_all_needs_no_rules(scheme: Scheme, bits: int) -> None:
    form = formats.of_scheme(scheme, 64)
    assert formats.section(scheme, {"model.layers.0.proj": form}) == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": bits,
        "group_size": 64,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
    }


def test_the_commonest_format_needs_no_rule() -> None:
    plan = drawn([Format(4, 64)], 0) | {"model.layers.7.mlp.down_proj": Format(8, 128)}
    section = formats.section("w4a16", plan)
    assert (section["bits"], section["group_size"]) == (4, 64)
    assert section["dynamic"] == {
        r"+:model\.layers\.(?:7)\.mlp\.(?:down_proj)$": {"bits": 8, "group_size": 128}
    }


def test_blocks_that_have_the_same_share_a_rule() -> None:
    plan = drawn([Format(4, 64)], 0)
    for block in (2, 10, 5):
        plan |= {f"model.layers.{block}.self_attn.{leaf}": FULL for leaf in ATTENTION}
    assert formats.section("w4a16", plan)["dynamic"] == {
        r"-:model\.layers\.(?:2|5|10)\.self_attn\.(?:k_proj|kv_proj|q_proj|qkv_proj|v_proj)$": {}
    }


def test_nothing_quantized_is_said_too() -> None:
    for scheme in ("w4a16", "w8a8"):
        plan = drawn([FULL], 0)
        section = formats.section(scheme, plan)
        assert {formats.of_layer(section, name) for name in plan} == {FULL}


@pytest.mark.parametrize(
    ("form", "bits"),
    [(Format(4, 128), 4 + 20 / 128), (Format(4, 32), 4 + 20 / 32), (Format(4), 4 + 20 / 1536),
     (Format(8, 64), 8 + 24 / 64), (INT8, 8 + 32 / 1536), (FULL, 16)],
    ids=str,
)  # fmt: skip
def test_scales_and_zero_points_count(form: Format, bits: float) -> None:
    shapes = {"a": (576, 1536), "b": (192, 1536)}
    plan = dict.fromkeys(shapes, form)
    assert formats.bits_per_weight(plan, shapes) == pytest.approx(bits)


def test_large_layers_weigh_more() -> None:
    shapes = {"a": (300, 64), "b": (100, 64)}
    assert formats.bits_per_weight({"a": Format(4, 32), "b": FULL}, shapes) == pytest.approx(
        0.75 * 4.625 + 0.25 * 16
    )


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({}, "no quantization this program writes"),
        ({"quant_method": "awq", "bits": 4}, "'awq'"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "'pack-quantized'"),
        ({"quant_method": "gptq", "bits": "four", "group_size": 64}, "'four' bits"),
        ({"quant_method": "gptq", "bits": 4}, "groups of None"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 64, "dynamic": {"m": {"bits": 3}}},
         "m would have 3 bits"),
    ],
)  # fmt: skip
def test_others_sections_are_refused(section: dict[str, Any], reason: str) -> None:
    with pytest.raises(ArtifactError, match=reason):
        formats.of_layer(section, "m")
