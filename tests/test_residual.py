"""`solver.residual`: which layers add to the stream in each family, found without knowing it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from quant.solver import residual
from tests import tiny
from tests.test_folds import Scene, scene

pytestmark = pytest.mark.arithmetic

BOTH = ["self_attn.o_proj", "mlp.down_proj"]


def made(kind: str, **changes: object) -> PreTrainedModel:
    settings = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                "num_attention_heads": 4, "vocab_size": tiny.VOCAB}  # fmt: skip
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**settings | changes)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model


def adders(given: Scene) -> list[str]:
    return residual.adders(given.block, given.groups(), given.trace)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_norm_behind_the_layer_tells_families_apart(family: str) -> None:
    assert adders(scene(tiny.model(family))) == ([] if family == "gemma3_text" else BOTH)


def test_layers_side_by_side_both_add() -> None:
    assert adders(scene(made("phi"))) == ["self_attn.dense", "mlp.fc2"]


def test_a_factor_behind_the_layer_is_none_of_ours() -> None:
    assert adders(scene(made("granite", residual_multiplier=0.3))) == []


def test_a_block_in_sixteen_bits_is_told_from_its_roundings() -> None:
    given = scene(tiny.model("llama").to(torch.bfloat16))
    assert adders(given) == BOTH


class Square(nn.Module):
    """Two layers of one width, of which one adds and one is in between."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = (nn.Linear(32, 32, bias=bias) for bias in (False, True))

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = hidden + self.outer(torch.relu(self.inner(hidden)))
        return out


def test_the_width_of_the_stream_alone_makes_no_adder() -> None:
    block, hidden = Square().requires_grad_(requires_grad=False), torch.randn(1, 8, 32)
    assert adders(Scene(block, lambda: block(hidden))) == ["outer"]
    assert not block.outer._forward_hooks and not block.inner._forward_hooks
