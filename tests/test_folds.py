"""`solver.folds`: who scales whose inputs in each family, found without knowing the family."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from quant.solver import folds
from quant.solver.folds import Feed
from tests import tiny

pytestmark = pytest.mark.arithmetic

QKV, MLP, DOWN = "self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"
SEPARATE = {QKV: "input_layernorm", MLP: "post_attention_layernorm", DOWN: "mlp.up_proj"}
EXPECTED: dict[str, dict[str, str]] = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral"), SEPARATE),
    # Its post-norms scale what goes into the residual stream, which no linear layer reads.
    "gemma3_text": {**SEPARATE, MLP: "pre_feedforward_layernorm"},
    "phi3": {
        "self_attn.qkv_proj": "input_layernorm",
        "mlp.gate_up_proj": "post_attention_layernorm",
        DOWN: "mlp.gate_up_proj",
    },
}


@dataclass
class Scene:
    """A block with its weights, and what it reads and puts out when called."""

    block: nn.Module
    call: Callable[[], Tensor]
    traces: int = 0
    fails_at: int | None = None

    def trace(self) -> tuple[Mapping[str, Tensor], Tensor]:
        self.traces += 1
        if self.traces == self.fails_at:
            raise TraceFailed
        read: dict[str, Tensor] = {}
        hooks = [
            module.register_forward_pre_hook(
                lambda _, args, name=name: read.update({name: args[0]})
            )
            for name, module in self.block.named_modules()
            if isinstance(module, nn.Linear)
        ]
        with torch.no_grad():
            output = self.call()
        for hook in hooks:
            hook.remove()
        return read, output

    def groups(self) -> list[list[str]]:
        groups: dict[int, list[str]] = {}
        read, _ = self.trace()
        for name, inputs in read.items():
            groups.setdefault(id(inputs), []).append(name)
        return list(groups.values())

    def feeds(self) -> dict[str, Feed]:
        return folds.found(self.block, self.groups(), self.trace)


class TraceFailed(Exception):
    pass


def scene(model: PreTrainedModel, place: int = 1, tokens: int = 8) -> Scene:
    """A decoder block of a model and the call that the model itself makes."""
    block, made = model.model.layers[place], {}

    def note(_module: nn.Module, args: Any, kwargs: Any) -> None:
        made["call"] = (args, kwargs)

    model.requires_grad_(requires_grad=False)
    hook = block.register_forward_pre_hook(note, with_kwargs=True)
    model(torch.arange(4, 4 + tokens)[None], use_cache=False)
    hook.remove()
    args, kwargs = made["call"]
    return Scene(block, lambda: first_of(block(*args, **kwargs)))


def first_of(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.fixture(params=tiny.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("place", [0, 1])
def test_the_feeds_of_each_family_are_found(family: str, place: int) -> None:
    feeds = scene(tiny.model(family), place).feeds()
    assert {group: feed.name for group, feed in feeds.items()} == EXPECTED[family]
    norms = [feed for feed in feeds.values() if feed.name.endswith("norm")]
    assert {feed.offset for feed in norms} == {1.0 if family == "gemma3_text" else 0.0}
    assert feeds[DOWN].first == (128 if family == "phi3" else 0)


def test_folding_factors_into_feeds_and_readers_changes_nothing(family: str) -> None:
    given = scene(tiny.model(family))
    groups, (read, output) = {g[0]: g for g in given.groups()}, given.trace()
    for place, (first, feed) in enumerate(given.feeds().items()):
        draw = torch.Generator().manual_seed(place)
        factors = torch.exp2(torch.rand(read[first].shape[-1], generator=draw) * 4 - 2)
        weight = feed.layer.get_parameter("weight")
        weight.data = feed.scaled(weight.data, factors)
        scaled = given.trace()[1]
        for member in groups[first]:
            given.block.get_submodule(member).get_parameter("weight").data /= factors
        assert not torch.allclose(scaled, output, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(given.trace()[1], output, rtol=1e-4, atol=1e-4)


def test_values_feed_the_output_layer_where_no_head_is_shared() -> None:
    settings = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    config = CONFIG_MAPPING["llama"](vocab_size=tiny.VOCAB, num_attention_heads=4, **settings)
    torch.manual_seed(0)
    feeds = scene(AutoModelForCausalLM.from_config(config).eval(), place=0).feeds()
    names = {group: feed.name for group, feed in feeds.items()}
    assert names == {**SEPARATE, "self_attn.o_proj": "self_attn.v_proj"}


class Shared(nn.Module):
    """A norm whose output goes through a linear layer, and a little of it around that."""

    def __init__(self, around: float) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(32), nn.Linear(32, 32, bias=False)
        self.around = around

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        out: Tensor = hidden + self.linear(normed) + self.around * normed
        return out


def shared(around: float, first_token: float = 1.0) -> Scene:
    torch.manual_seed(0)
    block = Shared(around).requires_grad_(requires_grad=False)
    hidden = torch.randn(1, 8, 32)
    hidden[:, 0, 5] = first_token
    return Scene(block, lambda: block(hidden))


def test_a_norm_that_only_the_group_reads_is_offered() -> None:
    assert shared(0.0).feeds()["linear"].name == "norm"
    assert shared(0.0, first_token=3e3).feeds()["linear"].name == "norm"


@pytest.mark.parametrize("first_token", [1.0, 3e3])
def test_a_norm_that_something_else_reads_too_is_not(first_token: float) -> None:
    """However large one token is, as the first one of trained models is."""
    assert shared(0.5, first_token).feeds() == {}


class Biased(nn.Module):
    """Two layers in a row, the first with a bias."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(32, 48, bias=bias), nn.Linear(48, 32, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.two(self.one(hidden))
        return out


def test_a_layer_with_a_bias_is_not_offered() -> None:
    hidden = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
    biased, plain = (
        Biased(bias=bias).requires_grad_(requires_grad=False) for bias in (True, False)
    )
    biased.one.bias.fill_(1e-6)
    assert Scene(biased, lambda: biased(hidden)).feeds() == {}
    assert Scene(plain, lambda: plain(hidden)).feeds()["two"].name == "one"


def held(block: nn.Module) -> Iterator[tuple[str, int, Tensor]]:
    for name, parameter in block.named_parameters():
        yield name, parameter.data_ptr(), parameter.clone()


def assert_unchanged(block: nn.Module, before: list[tuple[str, int, Tensor]]) -> None:
    for (name, place, tensor), (_, was, original) in zip(held(block), before, strict=True):
        assert place == was and torch.equal(tensor, original), name


def test_the_weights_are_restored_after_the_experiment(family: str) -> None:
    given = scene(tiny.model(family))
    before = list(held(given.block))
    assert given.feeds()
    assert_unchanged(given.block, before)


def test_the_weights_are_restored_after_a_failed_experiment() -> None:
    given = scene(tiny.model("phi3"))
    groups, before = given.groups(), list(held(given.block))
    given.traces = 0
    folds.found(given.block, groups, given.trace)
    for failing in range(1, given.traces + 1):
        given.traces, given.fails_at = 0, failing
        with pytest.raises(TraceFailed):
            folds.found(given.block, groups, given.trace)
        assert_unchanged(given.block, before)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_are_divided_by_what_the_stored_norm_divides_by(
    offset: float, dtype: torch.dtype
) -> None:
    """Scales no 16 bits can follow, and a weight of nothing, leave a channel to itself."""
    norm = nn.RMSNorm(6).requires_grad_(requires_grad=False)
    norm.weight.copy_(torch.tensor([1.0, 0.3, 2.0, 0.5, 1.5, 1.0]) - offset)
    norm.weight[5] = -offset
    feed = Feed("norm", norm, norm.weight, offset=offset)
    folded = feed.folded(torch.tensor([2.0, 0.7, 1e-30, 1e30, 1.0, 3.0]), dtype)
    divisor = feed.divisor(folded.float())
    assert folded.dtype == dtype and bool(torch.isfinite(divisor).all())
    own, now = norm.weight + offset, folded.float() + offset
    torch.testing.assert_close(now * divisor, own, rtol=1e-5, atol=0)
    torch.testing.assert_close(divisor[:2], torch.tensor([2.0, 0.7]), rtol=2**-7, atol=0)
    followed = dtype == torch.bfloat16 and not offset
    assert float(divisor[3]) == pytest.approx(1e30 if followed else 1.0, rel=2**-7)
