"""Our linear layers inside vLLM's real ones: chosen, loaded through vLLM's loaders, and right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.config import ModelConfig
from vllm.distributed import destroy_distributed_environment, destroy_model_parallel
from vllm.model_executor.kernels import linear as vllm_linear
from vllm.model_executor.kernels.linear import (
    CPUInt8ScaledMMLinearKernel,
    CPUWNA16LinearKernel,
    MPLinearLayerConfig,
    init_int8_linear_kernel,
)
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.platforms import PlatformEnum
from vllm.scalar_type import scalar_types

from bench.lora import one_process
from quant import checkpoint, formats, packing
from quant.checkpoint import Layer
from quant.formats import FULL, INT8, Format
from serve import engine_args, kernels, kernels_native, kernels_ops
from serve.kernel_report import kernel_of
from serve.settings import Settings
from tests import tiny

pytestmark = pytest.mark.arithmetic

INPUTS, HEAD = 256, 32
WIDTHS = {"q": 4 * HEAD, "k": HEAD, "v": HEAD}
ROWS = (1, 9, 70)
NAME = "model.layers.0.self_attn.qkv_proj"
# What bfloat16 and float16 scales and activations carry is in both sides; the kernel adds its own
# 1e-4 (1e-2 on PyTorch's) and the rounding of the output.
LOSS = {torch.float32: 2e-4, torch.bfloat16: 4e-3, torch.float16: 6e-4}


@pytest.fixture(scope="module", autouse=True)
def vllm_process() -> Iterator[None]:
    kernels.register()
    with one_process():
        yield
        destroy_model_parallel()
        destroy_distributed_environment()


def solved(width: int, scheme: str, group: int, dtype: torch.dtype) -> Layer:
    top = 7 if scheme == "w4a16" else 127
    codes = torch.randint(-top, top + 1, (width, INPUTS), dtype=torch.int8)
    groups = 1 if group == -1 else INPUTS // group
    scale = torch.rand(width, groups) / top + 0.01 / top
    return Layer(codes, scale if scheme == "w8a8" else scale.to(dtype))


def section_of(scheme: Any, group: int) -> dict[str, Any]:
    return formats.section(scheme, {NAME: formats.of_scheme(scheme, group)})


def config_of(scheme: Any, group: int = 64) -> Any:
    section = section_of(scheme, group)
    if scheme == "w8a8":
        return CompressedTensorsConfig.from_config(section)
    return get_quantization_config(kernels.GPTQ).from_config(section)


def qkv(config: Any, dtype: torch.dtype, *, bias: bool = False, name: str = NAME) -> Any:
    return QKVParallelLinear(
        INPUTS, HEAD, 4, 1, bias=bias, params_dtype=dtype, quant_config=config, prefix=name
    )


def load(layer: Any, tensors: dict[str, Tensor], *shard: str) -> None:
    for name, tensor in tensors.items():
        if name != "g_idx":  # vLLM drops it while reading
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, tensor, *shard)


def finish(layer: Any) -> None:
    layer.quant_method.process_weights_after_loading(layer)


def rows_of(count: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(count, INPUTS).to(dtype)


def distance(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("dtype", LOSS, ids=str)
@pytest.mark.parametrize(
    ("scheme", "group"),
    [("w4a16", 64), ("w4a16", 128), ("w4a16", -1), ("w8a16", 32), ("w8a16", -1)],
)
def test_a_gptq_layer_is_ours_and_right(scheme: Any, group: int, dtype: torch.dtype) -> None:
    layer = qkv(config_of(scheme, group), dtype, bias=True)
    assert isinstance(layer.quant_method.kernel, kernels.PackedGroupKernel)
    parts = {shard: solved(width, scheme, group, dtype) for shard, width in WIDTHS.items()}
    bias = torch.randn(sum(WIDTHS.values())).to(dtype)
    layer.bias.data.copy_(bias)
    for shard, part in parts.items():
        load(layer, checkpoint.encode(formats.of_scheme(scheme, group), part, dtype), shard)
    finish(layer)
    weight = torch.cat([part.weight() for part in parts.values()])
    for rows in ROWS:
        x = rows_of(rows, dtype)
        out = layer(x)[0]
        assert out.dtype is dtype
        assert distance(out, x.float() @ weight.t() + bias.float()) <= LOSS[dtype]


@pytest.mark.parametrize("dtype", LOSS, ids=str)
def test_a_w8a8_layer_is_ours_and_exact(dtype: torch.dtype) -> None:
    layer = qkv(config_of("w8a8"), dtype)
    assert isinstance(layer.scheme.kernel, kernels.PackedInt8Kernel)
    parts = {shard: solved(width, "w8a8", -1, dtype) for shard, width in WIDTHS.items()}
    for shard, part in parts.items():
        load(layer, checkpoint.encode(formats.INT8, part, dtype), shard)
    finish(layer)
    weight = torch.cat([part.weight() for part in parts.values()]).double()
    for rows in ROWS:
        x = torch.randint(-126, 127, (rows, INPUTS)).to(dtype)
        x[:, 0] = 127  # so that a token's scale is 1 and its integers are itself
        wanted = (x.double() @ weight.t()).to(dtype)
        # Scales and the 256 terms of a sum are float32, 2e-7 of each; the output may not be.
        torch.testing.assert_close(layer(x)[0], wanted, atol=1e-3, rtol=torch.finfo(dtype).eps)


def test_w8a8_with_one_scale_per_fused_part() -> None:
    section = json.loads(json.dumps(section_of("w8a8", -1)))
    section["config_groups"]["group_0"]["weights"]["strategy"] = "tensor"
    layer = qkv(CompressedTensorsConfig.from_config(section), torch.float32)
    weights = []
    for shard, width in WIDTHS.items():
        codes, scale = torch.randint(-127, 128, (width, INPUTS), dtype=torch.int8), torch.rand(1)
        load(layer, {"weight": codes, "weight_scale": scale}, shard)
        weights.append(codes * scale)
    finish(layer)
    x = torch.randint(-126, 127, (5, INPUTS)).float()
    x[:, 0] = 127
    assert distance(layer(x)[0], x @ torch.cat(weights).t()) <= 1e-6


@pytest.mark.parametrize("bits", [4, 8])
def test_a_pack_quantized_layer_is_ours_and_right(bits: int) -> None:
    section = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "input_activations": None,
                "weights": {
                    "num_bits": bits, "type": "int", "symmetric": True,
                    "strategy": "group", "group_size": 64, "dynamic": False,
                },
            }
        },
    }  # fmt: skip
    layer: Any = RowParallelLinear(
        INPUTS, 48, bias=False, params_dtype=torch.float32, prefix="model.layers.0.mlp.down_proj",
        quant_config=CompressedTensorsConfig.from_config(section),
    )  # fmt: skip
    part = solved(48, "w4a16" if bits == 4 else "w8a16", 64, torch.float32)
    words = packing.pack_gptq(part.codes.to(torch.int16) + 2 ** (bits - 1), bits)
    shape = torch.tensor([48, INPUTS])
    load(layer, {"weight_packed": words.t().contiguous(), "weight_scale": part.scale,
                 "weight_shape": shape})  # fmt: skip
    finish(layer)
    x = rows_of(9, torch.float32)
    assert distance(layer(x)[0], x @ part.weight().t()) <= LOSS[torch.float32]


def test_a_fused_layer_is_known_by_its_parts_though_the_model_tells_of_them_too_late() -> None:
    """As vLLM's Qwen3-MoE does of dense blocks among its mixtures; its StableLM tells of none."""
    config = config_of("w4a16")
    config.packed_modules_mapping = {}
    name = "model.layers.0.mlp.{}_proj".format
    config.modules_in_block_to_quantize = [name("gate"), name("up")]
    layer: Any = MergedColumnParallelLinear(
        INPUTS, [64, 64], bias=False, quant_config=config, prefix=name("gate_up")
    )
    assert isinstance(layer.quant_method, kernels.PackedGPTQMethod)
    config.modules_in_block_to_quantize = [name("down")]
    other: Any = MergedColumnParallelLinear(
        INPUTS, [64, 64], bias=False, quant_config=config, prefix=name("gate_up")
    )
    assert isinstance(other.quant_method, UnquantizedLinearMethod)
    attention = "model.layers.0.self_attn.{}_proj".format
    config.modules_in_block_to_quantize = [attention(part) for part in "qkv"]
    both = qkv(config, torch.float32, name=attention("qkv"))
    assert isinstance(both.quant_method, kernels.PackedGPTQMethod)


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8"])
def test_a_packed_layer_keeps_its_codes_only_and_a_weight_to_ask(scheme: Any) -> None:
    """LoRA asks qweight or weight for its device; scales and zero points are not kept twice."""
    layer: Any = MergedColumnParallelLinear(
        INPUTS, [64, 64], bias=False, params_dtype=torch.bfloat16, prefix=NAME,
        quant_config=config_of(scheme),
    )  # fmt: skip
    for shard in (0, 1):
        part = solved(64, scheme, 64 if scheme == "w4a16" else -1, torch.bfloat16)
        form = formats.of_scheme(scheme, 64)
        for name, tensor in checkpoint.encode(form, part, torch.bfloat16).items():
            if name != "g_idx":
                parameter = getattr(layer, name)
                parameter.weight_loader(parameter, tensor, shard)
    finish(layer)
    kept = dict(layer.named_parameters())
    assert list(kept) == ["qweight" if scheme == "w4a16" else "weight"]
    (codes,) = kept.values()
    assert codes.device == torch.device("cpu")
    assert codes.data_ptr() == layer.packed.codes.data_ptr()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bits": 2}, "bits=2"),
        ({"sym": False}, "sym=False"),
        ({"bits": 8, "group_size": 48}, "groups of 48 do not divide 256 inputs"),
        ({"bits": 8, "group_size": 512}, "groups of 512 do not divide 256 inputs"),
    ],
)
def test_a_gptq_layer_that_cannot_run_is_refused_at_load(
    change: dict[str, Any], reason: str
) -> None:
    section = section_of("w4a16", 64) | change
    with pytest.raises(ValueError, match=reason):
        qkv(get_quantization_config(kernels.GPTQ).from_config(section), torch.bfloat16)


def test_zero_points_and_float64_are_refused_with_the_reason() -> None:
    base: dict[str, Any] = {
        "full_weight_shape": (256, 64), "partition_weight_shape": (256, 64),
        "weight_type": scalar_types.uint4b8, "act_type": torch.float32,
        "group_size": 64, "zero_points": False,
    }  # fmt: skip
    can = kernels.PackedGroupKernel.can_implement
    assert can(MPLinearLayerConfig(**base)) == (True, None)
    for change, reason in (
        ({"zero_points": True}, "symmetric"),
        ({"weight_type": scalar_types.uint4}, "symmetric"),
        ({"act_type": torch.float64}, "float64"),
    ):
        fits, why = can(MPLinearLayerConfig(**(base | change)))
        assert not fits
        assert reason in str(why)


def test_static_int8_activations_stay_with_vllms_kernel() -> None:
    shared = {"is_channelwise": True, "input_symmetric": True, "module_name": NAME}
    ours = init_int8_linear_kernel(**shared, is_static_input_scheme=False)
    theirs = init_int8_linear_kernel(**shared, is_static_input_scheme=True)
    assert isinstance(ours, kernels.PackedInt8Kernel)
    assert isinstance(theirs, CPUInt8ScaledMMLinearKernel)


@pytest.mark.skipif(
    hasattr(torch.ops._C, "cpu_gemm_wna16"), reason="vLLM has an int4 kernel of its own here"
)
def test_int4_without_any_kernel_is_refused_at_load_not_at_the_first_request() -> None:
    section = section_of("w4a16", 48)
    with pytest.raises(ValueError, match="groups of 48 do not divide 256 inputs"):
        qkv(get_quantization_config(kernels.GPTQ).from_config(section), torch.bfloat16)


def test_what_is_left_to_vllms_int4_kernel_keeps_activations_at_16_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Groups of 16 are too narrow for ours. vLLM's exists from AVX-512 up; AMX would round to 8.

    Its own sums in bfloat16 are coarser where the processor has none.
    """
    facts = engine_args.Facts(on_cpu=True, cpu_flags=frozenset(), quantization="gptq")
    config, dtype = config_of("w4a16", 16), torch.bfloat16
    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        with pytest.raises(ValueError, match="groups of 16"):
            qkv(config, dtype)
        return
    parts = {shard: solved(width, "w4a16", 16, dtype) for shard, width in WIDTHS.items()}
    weight, x = torch.cat([part.weight() for part in parts.values()]), rows_of(9, dtype)

    def error(rounds: str) -> float:
        monkeypatch.setenv(engine_args.ROUNDS, rounds)
        layer = qkv(config, dtype)
        for shard, part in parts.items():
            load(layer, checkpoint.encode(formats.of_scheme("w4a16", 16), part, dtype), shard)
        finish(layer)
        names.append(kernel_of(layer))
        return distance(layer(x)[0], x.float() @ weight.t())

    names: list[str] = []
    served = error(engine_args.environment(Settings(), facts)[engine_args.ROUNDS])
    assert served <= min(2 * LOSS[dtype], 1.1 * error("1"))
    assert names[0] == "vLLM's CPUWNA16LinearKernel"
    rounded = "vLLM's CPUWNA16LinearKernel, activations rounded to 8 bits"
    assert names[1] in (names[0], rounded)  # by whether there is AMX


@pytest.mark.parametrize("scheme", ["w4a16", "w8a16", "w8a8"])
def test_a_layer_says_which_kernel_computes_it(scheme: Any) -> None:
    layer = qkv(config_of(scheme), torch.float32)
    for shard, width in WIDTHS.items():
        part = solved(width, scheme, -1 if scheme == "w8a8" else 64, torch.float32)
        form = formats.INT8 if scheme == "w8a8" else formats.of_scheme(scheme, 64)
        load(layer, checkpoint.encode(form, part, torch.float32), shard)
    finish(layer)
    assert kernel_of(layer) == f"{scheme.upper()} on {kernels_native.level()} (quantserve)"
    x = rows_of(3, torch.float32)
    x[1, 5] = torch.nan
    assert torch.equal(layer(x)[0].isnan().all(dim=1), torch.tensor([False, True, False]))
    assert kernel_of(qkv(None, torch.float32)) == "float32 (vLLM's UnquantizedLinearMethod)"


def test_vllms_int4_kernel_stays_only_where_it_exists() -> None:
    offered = vllm_linear._POSSIBLE_KERNELS[PlatformEnum.CPU]
    assert offered[0] is kernels.PackedGroupKernel
    assert (CPUWNA16LinearKernel in offered) == hasattr(torch.ops._C, "cpu_gemm_wna16")


def test_registering_twice_changes_nothing() -> None:
    before = list(vllm_linear._POSSIBLE_KERNELS[PlatformEnum.CPU])
    int8 = list(vllm_linear._POSSIBLE_INT8_KERNELS[PlatformEnum.CPU])
    kernels.register()
    assert before == vllm_linear._POSSIBLE_KERNELS[PlatformEnum.CPU]
    assert int8 == vllm_linear._POSSIBLE_INT8_KERNELS[PlatformEnum.CPU]


@pytest.mark.parametrize(
    ("section", "asked", "ours"),
    [
        ({"quant_method": "gptq"}, None, True),
        ({"quant_method": "GPTQ"}, "auto_gptq", True),
        ({"quant_method": "gptq"}, "marlin", False),
        ({"quant_method": "awq"}, None, False),
        ({"quant_method": "compressed-tensors"}, None, False),
        ({}, None, False),
    ],
)
def test_only_gptq_checkpoints_are_claimed(
    section: dict[str, Any], asked: str | None, *, ours: bool
) -> None:
    claimed = kernels.PackedGPTQConfig.override_quantization_method(section, asked)
    assert claimed == (kernels.GPTQ if ours else None)


def test_every_layer_of_a_mixed_checkpoint_has_its_own_bits_and_groups() -> None:
    forms = [Format(4, 64), Format(8, 128), Format(4, 32), Format(4, 128), FULL]
    kinds = ("q_proj", "k_proj", "v_proj")
    plan = {
        f"model.layers.{place}.self_attn.{kind}": form
        for place, form in enumerate([forms[0], *forms])
        for kind in kinds
    }
    config = get_quantization_config(kernels.GPTQ).from_config(formats.section("w4a16", plan))
    for place, form in enumerate([forms[0], *forms]):
        name = f"model.layers.{place}.self_attn.qkv_proj"
        layer, x = qkv(config, torch.float32, name=name), rows_of(9, torch.float32)
        if form == FULL:
            assert type(layer.quant_method) is UnquantizedLinearMethod
            continue
        scheme = "w4a16" if form.bits == 4 else "w8a16"
        parts = {s: solved(width, scheme, form.group, x.dtype) for s, width in WIDTHS.items()}
        for shard, part in parts.items():
            load(layer, checkpoint.encode(form, part, x.dtype), shard)
        finish(layer)
        weight = torch.cat([part.weight() for part in parts.values()])
        assert distance(layer(x)[0], x @ weight.t()) <= LOSS[x.dtype]


def test_a_w8a8_checkpoint_may_leave_whole_fused_layers_alone() -> None:
    names = [f"model.layers.{place}.self_attn.{kind}_proj" for place in (0, 1) for kind in "qkv"]
    plan = dict.fromkeys(names[:3], INT8) | dict.fromkeys(names[3:], FULL)
    config = CompressedTensorsConfig.from_config(formats.section("w8a8", plan))
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    assert isinstance(qkv(config, torch.float32).scheme.kernel, kernels.PackedInt8Kernel)
    left = qkv(config, torch.float32, name="model.layers.1.self_attn.qkv_proj")
    assert type(left.quant_method) is UnquantizedLinearMethod


def test_layers_a_checkpoint_leaves_alone_stay_vllms() -> None:
    section = section_of("w4a16", 64) | {"dynamic": {f"-:{NAME}": {}}}
    config = get_quantization_config(kernels.GPTQ).from_config(section)
    assert type(qkv(config, torch.float32).quant_method) is UnquantizedLinearMethod
    assert type(qkv(None, torch.float32).quant_method) is UnquantizedLinearMethod


def test_plain_layers_still_answer() -> None:
    layer: LinearBase = qkv(None, torch.float32)
    layer.weight.data.normal_()
    weight = layer.weight.detach().clone()
    finish(layer)
    x = rows_of(3, torch.float32)
    torch.testing.assert_close(layer(x)[0], x @ weight.t(), rtol=1e-4, atol=1e-4)


def vocabulary(kind: type[Any], numbers: Tensor) -> Any:
    layer = kind(len(numbers), INPUTS, params_dtype=torch.float32)
    parameter = layer.weight
    parameter.weight_loader(parameter, numbers)
    return layer


def test_a_head_of_bfloat16_numbers_takes_half_the_memory_and_stays_exact() -> None:
    numbers = torch.randn(128, INPUTS).bfloat16().float()
    head = vocabulary(ParallelLMHead, numbers)
    finish(head)
    assert head.weight.dtype is torch.bfloat16
    for rows in (1, 40):
        x = rows_of(rows, torch.float32)
        out = head.quant_method.apply(head, x)
        torch.testing.assert_close(out, x @ numbers.t(), rtol=1e-4, atol=1e-4)


def test_a_head_that_needs_its_digits_keeps_float32() -> None:
    numbers = torch.randn(128, INPUTS)
    head = vocabulary(ParallelLMHead, numbers)
    finish(head)
    x = rows_of(2, torch.float32)
    out = head.quant_method.apply(head, x)
    torch.testing.assert_close(out, x @ numbers.t(), rtol=1e-4, atol=1e-4)
    assert getattr(head, "cpu_linear", None) is not kernels_ops.wide_linear


def test_a_head_tied_to_the_embedding_shares_its_narrow_weight() -> None:
    numbers = torch.randn(128, INPUTS).half().float()
    table, head = (
        vocabulary(VocabParallelEmbedding, numbers),
        vocabulary(ParallelLMHead, numbers),
    )
    head = head.tie_weights(table)
    finish(table)
    if head is not table:
        finish(head)
    assert head.weight.data_ptr() == table.weight.data_ptr()
    ids = torch.tensor([0, 127, 5])
    assert torch.equal(table(ids), numbers[ids])
    x = rows_of(2, torch.float32)
    out = head.quant_method.apply(head, x)
    torch.testing.assert_close(out, x @ numbers.t(), rtol=1e-4, atol=1e-4)


def test_a_claimed_checkpoint_is_read_as_ours(tmp_path: Path) -> None:
    """vLLM's own choice of configuration, from a config.json."""
    tiny.model().save_pretrained(tmp_path)
    tiny.tokenizer(tmp_path)
    for scheme, expected in (("w4a16", kernels.GPTQ), ("w8a8", "compressed-tensors")):
        path = tmp_path / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"] = section_of(scheme, 32)
        path.write_text(json.dumps(config))
        assert ModelConfig(model=str(tmp_path), dtype="float32").quantization == expected


@pytest.mark.skipif(
    kernels_native.level() != "avx512" or "QUANTSERVE_MAX_CPU_ISA" in os.environ,
    reason="already held to a level",
)
def test_layers_and_packed_layers_hold_at_avx2() -> None:
    """The same tests on vLLM's AVX2 extension, and on our AVX2 code, in another process."""
    here = Path(__file__)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "serve.isa", "-p", "no:cacheprovider",
         str(here), str(here.with_name("test_kernels_ops.py"))],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "QUANTSERVE_MAX_CPU_ISA": "avx2"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "1 skipped" in done.stdout, "all but this test should have run, at AVX2"
