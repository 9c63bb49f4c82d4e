"""vLLM's own C++ RMSNorm for x86 CPUs, which its eager path leaves to PyTorch; clean KV blocks; a
rotation that is right for a part of each head.

The CPU extension ships `rms_norm` and `fused_add_rms_norm`, but vLLM 0.32 calls them only on GPUs:
an eager CPU layer runs six small PyTorch operators instead. With one token in flight such
operators cost more than the arithmetic. What the kernel does not take (a variance override, mixed
dtypes, strided input) still goes the stock way.
"""

from __future__ import annotations

import torch
from vllm.model_executor.custom_op import CustomOp, op_registry_oot
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.v1.kv_cache_interface import KVCacheConfig


class CpuRMSNorm(RMSNorm):  # type: ignore[misc]
    """RMSNorm on `_C.rms_norm`; x [tokens, hidden], in place when a residual is given."""

    def forward_cpu(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        weight = self.weight.data
        if (
            not self.has_weight
            or self.variance_size_override is not None
            or weight.dtype != x.dtype
            or not x.is_contiguous()
        ):
            return self.forward_native(x, residual)  # type: ignore[no-any-return]
        if residual is None:
            out = torch.empty_like(x)
            torch.ops._C.rms_norm(out, x, weight, self.variance_epsilon)
            return out
        torch.ops._C.fused_add_rms_norm(x, residual, weight, self.variance_epsilon)
        return x, residual


def zero_new_blocks() -> None:
    """Have the KV blocks of a request zeroed before it gets them, as vLLM does for Mamba.

    Attention on a CPU reads a block to its end and multiplies what lies behind the last token by
    zero: a NaN that another request left there would be in this one's answer.
    """
    KVCacheConfig.needs_kv_cache_zeroing = property(lambda _: True)


def rotate_parts() -> None:
    """Hand vLLM's C++ rotation [tokens, heads * width], whatever shape it is asked for.

    Of [tokens, heads, width], which latent attention has, it turns other numbers than it should:
    DeepSeek's and its kin's came out wrong wherever YaRN's own code did not do it instead.
    """
    stock = vars(RotaryEmbedding)["forward_cpu"]
    if stock.__module__ == __name__:
        return

    def forward_cpu(
        self: RotaryEmbedding,
        positions: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if query.dim() < 3:
            return stock(self, positions, query, key)  # type: ignore[no-any-return]
        flat = [x if x is None else x.reshape(len(x), -1) for x in (query, key)]
        turned = stock(self, positions, *flat)
        return turned[0].view(query.shape), turned[1] if key is None else turned[1].view(key.shape)

    RotaryEmbedding.forward_cpu = forward_cpu


def register() -> None:
    """Put the norm in vLLM's out-of-tree registry, keep blocks clean and rotations right.

    Idempotent; CPUs only.
    """
    zero_new_blocks()
    rotate_parts()
    if RMSNorm.__name__ not in op_registry_oot:
        CustomOp.register_oot(CpuRMSNorm, name=RMSNorm.__name__)
