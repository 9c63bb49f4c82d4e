"""RMSNorm through vLLM's C++ kernel equals the stock PyTorch path."""

from __future__ import annotations

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

from serve import cpu_ops

pytestmark = pytest.mark.arithmetic


@pytest.fixture
def norm() -> cpu_ops.CpuRMSNorm:
    with set_current_vllm_config(VllmConfig()):
        layer = cpu_ops.CpuRMSNorm(576, eps=1e-5)
    layer.weight.data.uniform_(0.5, 1.5)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_it_equals_the_stock_norm(
    norm: cpu_ops.CpuRMSNorm, dtype: torch.dtype, tokens: int
) -> None:
    norm = norm.to(dtype)
    x, residual = torch.randn(2, tokens, 576).to(dtype)
    expected = norm.forward_native(x.clone())
    torch.testing.assert_close(norm.forward_cpu(x.clone()), expected)
    wanted, carried = norm.forward_native(x.clone(), residual.clone())
    out, kept = norm.forward_cpu(x.clone(), residual.clone())
    torch.testing.assert_close(kept, carried)
    # The kernel sums before rounding to bfloat16, PyTorch after: one unit in the last place.
    torch.testing.assert_close(
        out, wanted, rtol=0.02, atol=1e-2 if dtype is torch.bfloat16 else 1e-5
    )


@pytest.mark.parametrize("stranger", [float("nan"), float("inf")])
def test_it_hides_nothing(norm: cpu_ops.CpuRMSNorm, stranger: float) -> None:
    x, residual = torch.randn(2, 3, 576)
    x[1, 9] = stranger
    wanted = norm.forward_native(x.clone(), residual.clone())[0]
    got = norm.forward_cpu(x.clone(), residual.clone())[0]
    assert torch.equal(got.isnan(), wanted.isnan()) and got[1].isnan().any()


def test_strided_input_goes_the_stock_way(norm: cpu_ops.CpuRMSNorm) -> None:
    x = torch.randn(4, 1152)[:, :576]
    torch.testing.assert_close(norm.forward_cpu(x), norm.forward_native(x.contiguous()))


@pytest.mark.parametrize("neox", [True, False])
def test_a_part_of_each_head_is_turned_as_the_stock_code_does(*, neox: bool) -> None:
    cpu_ops.rotate_parts()
    with set_current_vllm_config(VllmConfig()):
        rotary = RotaryEmbedding(64, 64, 128, 10000, neox, torch.float32)
    heads, shared = torch.randn(9, 4, 96), torch.randn(9, 576)
    query, key, places = heads[..., 32:], shared[:, None, 512:], torch.arange(9)
    wanted = rotary.forward_native(places, query.clone(), key.clone())
    got = rotary.forward_cpu(places, query, key)
    assert [one.shape for one in got] == [query.shape, key.shape]
    for one, its in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.reshape(9, -1), its.reshape(9, -1))


def test_registering_twice_is_harmless() -> None:
    cpu_ops.register()
    cpu_ops.register()
    assert op_registry_oot["RMSNorm"] is cpu_ops.CpuRMSNorm
