"""Puts our CPU linear layers into vLLM: W4A16, W8A16 (gptq) and W8A8 (compressed-tensors).

Stock vLLM 0.32 on x86: its 4-bit kernel does not exist in the AVX2 build and kills the engine at
the first request, 8-bit GPTQ is refused, W8A8 saturates 16-bit sums without VNNI and, having
dropped its weight, cannot carry LoRA; GPTQ refuses float32 activations, the fast kind where there
is no native bfloat16. `register` offers our kernels first, and removes the stock one where it
could only fail later: what neither can run is refused while loading, by vLLM's own error that
lists every kernel's reason. Elsewhere than on x86 CPUs `register` changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Parameter, functional
from vllm.model_executor.kernels import linear as vllm_linear
from vllm.model_executor.kernels.linear import (
    CPUWNA16LinearKernel,
    Int8ScaledMMLinearKernel,
    Int8ScaledMMLinearLayerConfig,
    MPLinearKernel,
    MPLinearLayerConfig,
)
from vllm.model_executor.layers import utils as vllm_layers
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.auto_gptq import (
    AutoGPTQConfig,
    AutoGPTQLinearMethod,
    get_moe_quant_method,
)
from vllm.model_executor.layers.quantization.utils.gptq_utils import get_linear_quant_method
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.platforms import CpuArchEnum, PlatformEnum, current_platform
from vllm.scalar_type import scalar_types

from serve import kernels_experts, kernels_ops
from serve.kernels_experts import PackedGPTQExperts

GPTQ = "quantserve_gptq"
Layer = Any  # a vLLM module: its parameters appear at run time
_FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "qkv_proj": ("q_proj", "k_proj", "v_proj")}
ACTIVATIONS = (torch.float32, torch.bfloat16, torch.float16)


def register() -> None:
    """Offer our kernels to vLLM in this process. Idempotent; compiles nothing."""
    if not current_platform.is_cpu() or current_platform.get_cpu_architecture() != CpuArchEnum.X86:
        return
    grouped = vllm_linear._POSSIBLE_KERNELS[PlatformEnum.CPU]
    if PackedGroupKernel in grouped:
        return
    grouped.insert(0, PackedGroupKernel)
    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        grouped.remove(CPUWNA16LinearKernel)
    vllm_linear._POSSIBLE_INT8_KERNELS[PlatformEnum.CPU].insert(0, PackedInt8Kernel)
    register_weight_loader_v2_supported_method(PackedGPTQMethod)
    register_quantization_config(GPTQ)(PackedGPTQConfig)
    kernels_experts.register()
    vllm_layers.dispatch_cpu_unquantized_gemm = _narrow_head
    UnquantizedEmbeddingMethod.embedding = _embedding


class PackedGPTQConfig(AutoGPTQConfig):  # type: ignore[misc]
    """Claims `quant_method: gptq` checkpoints: 8 bits and float32 activations as well."""

    @classmethod
    def get_name(cls) -> str:
        return GPTQ

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return list(ACTIVATIONS)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, **_: object
    ) -> str | None:
        wanted = (None, "gptq", "auto_gptq", GPTQ)
        ours = hf_quant_cfg.get("quant_method", "").lower() == "gptq" and user_quant in wanted
        return GPTQ if ours else None

    def get_quant_method(self, layer: Layer, prefix: str) -> object:
        home, _, leaf = prefix.rpartition(".")
        # vLLM's Qwen3-MoE says what its dense blocks fuse only after it has passed this on, and its
        # StableLM never does.
        parts = _FUSED.get(leaf, ())
        if parts and f"{home}.{parts[0]}" in self.modules_in_block_to_quantize:
            self.packed_modules_mapping[leaf] = list(parts)
        if isinstance(layer, LinearBase | VocabParallelEmbedding):
            return get_linear_quant_method(self, layer, prefix, PackedGPTQMethod)
        if isinstance(layer, RoutedExperts):
            return get_moe_quant_method(self, layer, prefix, PackedGPTQExperts)
        return super().get_quant_method(layer, prefix)


class PackedGPTQMethod(AutoGPTQLinearMethod):  # type: ignore[misc]
    """The stock parameters and loading, without the stock check that only Marlin could run them."""

    def __init__(self, quant_config: AutoGPTQConfig) -> None:
        self.quant_config = quant_config
        self.input_dtype = None
        self.quant_type = quant_config.quant_type


class PackedGroupKernel(MPLinearKernel):  # type: ignore[misc]
    """Symmetric 4- and 8-bit weights with a scale per group or output (gptq, pack-quantized)."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        inputs, group = c.partition_weight_shape[0], c.group_size
        if c.weight_type not in (scalar_types.uint4b8, scalar_types.uint8b128) or c.zero_points:
            return False, f"weights must be symmetric 4 or 8 bit integers, not {c.weight_type}"
        if c.act_type not in ACTIVATIONS:
            return False, f"activations must be one of {ACTIVATIONS}, not {c.act_type}"
        if group != -1 and (group > kernels_ops.WIDEST or group % 32 or inputs % group):
            return False, f"groups of {group} do not divide {inputs} inputs into runs of 32 to 256"
        return True, None

    def process_weights_after_loading(self, layer: Layer) -> None:
        words, scales, zeros = self._get_weight_params(layer)
        # gptq stores words [K / codes per word, N] and scales [G, N]; pack-quantized the transpose
        codes = kernels_ops.unpack(
            words.data.t() if words.input_dim == 0 else words.data, self.bits
        )
        rows = scales.data.t() if scales.output_dim == 1 else scales.data
        layer.packed = kernels_ops.pack(codes, rows, self.bits)
        # LoRA asks the packed weight for its device, so it stays; the rest lives in `packed`.
        _replace(layer, self.w_q_name, layer.packed.codes)
        _replace(layer, self.w_s_name, None)
        if zeros is not None:
            _replace(layer, self.w_zp_name, None)

    def apply_weights(
        self, layer: Layer, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        out: torch.Tensor = layer.packed(x, bias)
        return out

    @property
    def bits(self) -> int:
        return int(self.config.weight_type.size_bits)


class PackedInt8Kernel(Int8ScaledMMLinearKernel):  # type: ignore[misc]
    """Eight-bit weights and dynamic per-token eight-bit activations, summed exactly."""

    @classmethod
    def is_supported(cls, *_: object) -> tuple[bool, str | None]:
        return current_platform.is_cpu(), "CPUs only"

    @classmethod
    def can_implement(cls, c: Int8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        dynamic = c.input_symmetric and not c.is_static_input_scheme
        return dynamic, "activations must be quantized per token, dynamically and symmetrically"

    def process_weights_after_loading(self, layer: Layer) -> None:
        weight_name, scale_name = self.layer_param_names[:2]
        weight, scale = layer.get_parameter(weight_name).data, layer.get_parameter(scale_name).data
        if not self.config.is_channelwise:
            scale = scale.repeat_interleave(torch.tensor(layer.logical_widths))
        layer.packed = kernels_ops.pack(weight, scale.view(-1, 1), 8, int8_rows=True)
        _replace(layer, weight_name, layer.packed.codes)
        _replace(layer, scale_name, None)

    def apply_weights(
        self, layer: Layer, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        out: torch.Tensor = layer.packed(x, bias)
        return out


def _replace(layer: Layer, name: str, data: torch.Tensor | None) -> None:
    delattr(layer, name)
    value = None if data is None else Parameter(data, requires_grad=False)
    layer.register_parameter(name, value)


_stock_dispatch = vllm_layers.dispatch_cpu_unquantized_gemm


def _narrow_head(layer: Layer, remove_weight: bool) -> None:  # noqa: FBT001 - vLLM's
    """Keep embeddings and output head in 16 bits under float32 activations, when that is exact."""
    ours = isinstance(layer, VocabParallelEmbedding) and layer.params_dtype == torch.float32
    if not ours or layer.weight.is_meta:
        _stock_dispatch(layer, remove_weight)
        return
    # A head tied to the embedding shares its parameter and may find it narrow already.
    narrow = kernels_ops.narrowest(layer.weight.data)
    if narrow is None:
        _stock_dispatch(layer, remove_weight)
        return
    layer.weight.data = narrow
    layer.cpu_linear = kernels_ops.wide_linear


def _embedding(
    _: UnquantizedEmbeddingMethod, layer: VocabParallelEmbedding, ids: torch.Tensor
) -> torch.Tensor:
    return functional.embedding(ids, layer.weight).to(layer.params_dtype)
