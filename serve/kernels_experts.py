"""Puts our CPU kernels under vLLM's mixtures of experts: W4A16, W8A16 (gptq) and W8A8.

Stock vLLM 0.32 on x86 has quantized experts for AVX-512 and AMX only. Ours are the packed linear
layers of `kernels_ops`, two for each expert, called for the tokens that the router gave it.
Experts that are not quantized get vLLM's own CPU kernel, with adapters or without.
Refuses, while loading, experts that are not gated by SiLU or lie on several ranks.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe import (
    unquantized_fused_moe_method as stock_plain,
)
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.oracle import unquantized
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig, AutoGPTQMoEMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w8a8_int8 as stock_int8,
)

from serve import kernels_ops
from serve.kernels_ops import PackedLinear

Layer = Any  # a vLLM module: its parameters appear at run time
Packed = list[tuple[PackedLinear, PackedLinear]]  # of each expert: gate and up together, and down


def register() -> None:
    """Let compressed-tensors take our int8 experts in this process; `kernels` gives gptq's.

    Experts in full precision are chosen as without LoRA: vLLM would take Triton's, for adapters
    that no expert gets here (`quant.lora.served`), and a CPU has no Triton.
    """
    stock_int8.CompressedTensorsW8A8Int8MoEMethod = PackedInt8Experts
    stock_plain.select_unquantized_moe_backend = plain_backend


def plain_backend(moe_config: FusedMoEConfig) -> Any:
    """vLLM's choice of a backend and its experts, as if no adapter were to come."""
    plain = copy.copy(moe_config)
    plain.is_lora_enabled = False
    return unquantized.select_unquantized_moe_backend(plain)


class PackedGPTQExperts(AutoGPTQMoEMethod):  # type: ignore[misc]
    """The stock parameters and loading, without the stock choice among kernels."""

    def __init__(self, quant_config: AutoGPTQConfig, moe: FusedMoEConfig) -> None:
        FusedMoEMethodBase.__init__(self, moe)
        check(moe)
        self.quant_config = quant_config
        self.input_dtype = None

    def process_weights_after_loading(self, layer: Layer) -> None:
        bits = self.quant_config.quant_type.size_bits
        parts = [
            [
                kernels_ops.pack(kernels_ops.unpack(words.t(), bits), scales.t(), bits)
                for words, scales in zip(*tensors, strict=True)
            ]
            for tensors in (
                (layer.w13_qweight.data, layer.w13_scales.data),
                (layer.w2_qweight.data, layer.w2_scales.data),
            )
        ]
        _emptied(layer).packed = list(zip(*parts, strict=True))

    def get_fused_moe_quant_config(self, _layer: Layer) -> None:
        return None

    def apply(
        self, layer: Layer, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, **_: object
    ) -> Tensor:
        return mixed(layer.packed, x, topk_weights, topk_ids)


class PackedInt8Experts(stock_int8.CompressedTensorsW8A8Int8MoEMethod):  # type: ignore[misc]
    """Eight-bit weights, and activations rounded to eight bits for each token of each expert."""

    def __init__(
        self,
        weight_quant: Any,
        input_quant: Any,
        moe: FusedMoEConfig,
        layer_name: str | None = None,  # noqa: ARG002 - vLLM's
    ) -> None:
        FusedMoEMethodBase.__init__(self, moe)
        check(moe)
        self.weight_quant, self.input_quant = weight_quant, input_quant
        self.static_input_scales = False

    def process_weights_after_loading(self, layer: Layer) -> None:
        parts = [
            [
                kernels_ops.pack(codes, scale.view(-1, 1), 8, int8_rows=True)
                for codes, scale in zip(*tensors, strict=True)
            ]
            for tensors in (
                (layer.w13_weight.data, layer.w13_weight_scale.data),
                (layer.w2_weight.data, layer.w2_weight_scale.data),
            )
        ]
        _emptied(layer).packed = list(zip(*parts, strict=True))

    def get_fused_moe_quant_config(self, _layer: nn.Module) -> None:
        return None

    def apply(
        self, layer: Layer, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, **_: object
    ) -> Tensor:
        return mixed(layer.packed, x, topk_weights, topk_ids)


def check(moe: FusedMoEConfig) -> None:
    """ValueError for a mixture that is computed differently."""
    if moe.activation != MoEActivation.SILU or moe.has_bias:
        raise ValueError(
            f"experts with {moe.activation} or a bias have no kernel on this CPU; SiLU's have"
        )
    if moe.ep_size > 1 or moe.tp_size > 1:
        raise ValueError("quantized experts run on one rank of a CPU; leave parallel sizes at 1")


def mixed(experts: Packed, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """x [M, K] through the chosen experts [M, top] of each row, by their weights [M, top]."""
    out = torch.zeros(x.shape, dtype=torch.float32)
    for place in sorted(set(chosen.flatten().tolist())):
        row, slot = (chosen == place).nonzero(as_tuple=True)
        both, down = experts[place]
        gate, up = both(x[row], None).chunk(2, dim=-1)
        made = down(functional.silu(gate) * up, None)
        out.index_add_(0, row, made.float() * weights[row, slot, None].float())
    return out.to(x.dtype)


def _emptied(layer: Layer) -> Layer:
    """Without what was packed."""
    for name, _ in list(layer.named_parameters(recurse=False)):
        delattr(layer, name)
    return layer
