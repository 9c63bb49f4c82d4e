"""`serve.kernels_experts`: quantized experts under vLLM's own loading, right, or refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)

from quant import checkpoint, formats
from quant.checkpoint import Layer
from quant.formats import INT8, Format
from quant.solver import int8
from serve import kernels, kernels_experts
from serve.kernels_experts import PackedGPTQExperts, PackedInt8Experts

pytestmark = pytest.mark.arithmetic

EXPERTS, HIDDEN, INNER, TOP = 5, 128, 64, 2
CONFIG = FusedMoEConfig(
    num_experts=EXPERTS,
    experts_per_token=TOP,
    hidden_dim=HIDDEN,
    intermediate_size=INNER,
    num_local_experts=EXPERTS,
    num_logical_experts=EXPERTS,
    activation=MoEActivation.SILU,
    device="cpu",
    routing_method=RoutingMethodType.Renormalize,
    moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
    in_dtype=torch.float32,
)
NAME = "model.layers.0.mlp.experts.0.gate_proj"


def layers_of(form: Format) -> list[dict[str, Layer]]:
    """Random gate, up and down of every expert."""
    draw = torch.Generator().manual_seed(0)
    top = 7 if form.bits == 4 else 127

    def layer(rows: int, columns: int) -> Layer:
        codes = torch.randint(-top, top + 1, (rows, columns), dtype=torch.int8, generator=draw)
        groups = 1 if form.group < 0 else columns // form.group
        return Layer(codes, (torch.rand(rows, groups, generator=draw) + 0.1) / top / 8)

    shapes = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    return [{name: layer(*shape) for name, shape in shapes.items()} for _ in range(EXPERTS)]


def filled(method: Any, experts: list[dict[str, Layer]], form: Format) -> nn.Module:
    """vLLM's own parameters with what a checkpoint has for each expert, packed."""
    module = nn.Module()
    method.create_weights(module, EXPERTS, HIDDEN, INNER, torch.float32)
    across = 1 if form.inputs == 16 else 0  # gptq stores inputs first
    for place, parts in enumerate(experts):
        told = {k: checkpoint.encode(form, v, torch.float32) for k, v in parts.items()}
        for kind in told["gate"]:
            if kind == "g_idx":
                continue
            both = torch.cat([told["gate"][kind], told["up"][kind]], dim=across)
            module.get_parameter(f"w13_{kind}").data[place].copy_(both)
            module.get_parameter(f"w2_{kind}").data[place].copy_(told["down"][kind])
    method.process_weights_after_loading(module)
    return module


def expected(experts: list[dict[str, Layer]], x: Tensor, form: Format, routing: Any) -> Tensor:
    seen = int8.as_served if form.inputs == 8 else lambda rows: rows
    weights, chosen = routing
    out = torch.zeros_like(x)
    for row in range(len(x)):
        for weight, place in zip(weights[row], chosen[row].tolist(), strict=True):
            gate, up, down = (experts[place][part].weight() for part in ("gate", "up", "down"))
            given = seen(x[row : row + 1])
            inner = functional.silu(given @ gate.T) * (given @ up.T)
            out[row] += weight * (seen(inner) @ down.T)[0]
    return out


@pytest.mark.parametrize("form", [Format(4, 32), Format(8, 32), Format(4), INT8], ids=str)
def test_experts_compute_what_their_codes_say(form: Format) -> None:
    kernels.register()
    scheme: Any = "w8a8" if form == INT8 else "w4a16"
    section = formats.section(scheme, {NAME: form})
    if form == INT8:
        told = CompressedTensorsConfig.from_config(section).target_scheme_map["Linear"]
        method: Any = PackedInt8Experts(told["weights"], told["input_activations"], CONFIG)
    else:
        method = PackedGPTQExperts(kernels.PackedGPTQConfig.from_config(section), CONFIG)
    assert not method.is_monolithic
    experts = layers_of(form)
    module = filled(method, experts, form)
    assert not list(module.parameters()), "what was packed is held twice"
    draw = torch.Generator().manual_seed(1)
    for rows in (1, 9):
        x = torch.randn(rows, HIDDEN, generator=draw)
        scores = torch.rand(rows, EXPERTS, generator=draw)
        scores[:, 3] = -1.0  # nobody's
        routing = scores.topk(TOP)
        out = method.apply(
            layer=module,
            x=x,
            topk_weights=routing.values,
            topk_ids=routing.indices.int(),
            shared_experts=None,
            shared_experts_input=None,
        )
        wanted = expected(experts, x, form, routing)
        assert (out - wanted).norm() < 1e-3 * wanted.norm()
        assert method.apply(module, x.bfloat16(), *routing).dtype == torch.bfloat16
        x[-1, 5] = torch.nan
        strange = method.apply(module, x, *routing)
        assert strange[-1].isnan().all() and torch.equal(strange[:-1], out[:-1])


def test_what_no_kernel_computes_is_refused_while_loading() -> None:
    kernels_experts.check(CONFIG)
    with pytest.raises(ValueError, match="have no kernel"):
        kernels_experts.check(replace(CONFIG, activation=MoEActivation.GELU))
    apart = replace(FusedMoEParallelConfig.make_no_parallel(), tp_size=2)
    with pytest.raises(ValueError, match="one rank"):
        kernels_experts.check(replace(CONFIG, moe_parallel_config=apart))


def test_experts_in_full_precision_run_on_the_cpu_with_lora_as_without() -> None:
    chosen = [
        kernels_experts.plain_backend(replace(CONFIG, is_lora_enabled=lora))
        for lora in (True, False)
    ]
    assert chosen[0] == chosen[1] and chosen[0][0].name == "CPU"
