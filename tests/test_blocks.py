"""`quant.blocks`: every family's own code, block by block, as transformers computes it whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from quant import blocks, source
from quant.blocks import Decoder, Stream
from quant.errors import SourceError
from quant.source import Source
from tests import tiny

CPU = torch.device("cpu")
SEPARATE = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]
FUSED = [
    ["self_attn.qkv_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_up_proj"],
    ["mlp.down_proj"],
]


class Watching:
    """A solver that keeps every weight and remembers whom it visited with what."""

    def __init__(self) -> None:
        self.visits: list[tuple[str, list[str]]] = []
        self.inputs: list[list[Tensor]] = []

    def seen(self, inputs: Tensor) -> Tensor:
        return inputs

    def visit(
        self, decoder: Decoder, place: int, names: Sequence[str], inputs: Iterator[Tensor]
    ) -> None:
        self.visits.append((f"{decoder.prefix}{place}", list(names)))
        self.inputs.append([rows.clone() for rows in inputs])


class Silencing(Watching):
    """Sets the weights of layers of one name to zero."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def visit(
        self, decoder: Decoder, place: int, names: Sequence[str], inputs: Iterator[Tensor]
    ) -> None:
        super().visit(decoder, place, names, inputs)
        if self.name in names:
            decoder.linear(place, self.name).weight.zero_()


class Doubling(Watching):
    """Layers compute with twice their inputs."""

    def seen(self, inputs: Tensor) -> Tensor:
        return inputs * 2


def opened(folder: Path, family: str = "llama") -> Source:
    return source.open(str(tiny.model_folder(folder, family, dtype=torch.float32)), cache=folder)


def rows(count: int = 3, length: int = 24) -> list[tuple[Tensor, Tensor]]:
    """Two batches of token rows, every token real."""
    ids = torch.randint(4, tiny.VOCAB, (count, length), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids, dtype=torch.bool)
    return [(ids[:2], mask[:2]), (ids[2:], mask[2:])]


def walked(
    model: Source, given: list[tuple[Tensor, Tensor]], solver: blocks.Solver
) -> tuple[Decoder, list[list[Tensor]]]:
    """The hidden states of each batch before the first block and after every one."""
    decoder = blocks.skeleton(model, CPU)
    streams, probe = blocks.embed(decoder, model, given)
    states = [[stream.hidden] for stream in streams]
    for place in range(len(decoder.blocks)):
        blocks.run(decoder, place, model, (streams, probe), solver)
        for kept, stream in zip(states, streams, strict=True):
            kept.append(stream.hidden)
    return decoder, states


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_walking_all_blocks_is_what_the_whole_model_computes(family: str, tmp_path: Path) -> None:
    model, watching = opened(tmp_path, family), Watching()
    _, states = walked(model, rows(), watching)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for (ids, _), ours in zip(rows(), states, strict=True):
        with torch.no_grad():
            theirs = whole(ids, output_hidden_states=True, use_cache=False).hidden_states
            last = whole.model.norm(ours[-1])
        assert len(ours) == len(theirs)
        for mine, their in zip([*ours[:-1], last], theirs, strict=True):
            assert torch.equal(mine, their)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_layers_that_share_an_input_are_found(family: str, tmp_path: Path) -> None:
    watching = Watching()
    walked(opened(tmp_path, family), rows(), watching)
    groups = FUSED if family == "phi3" else SEPARATE
    assert watching.visits == [
        (block, group) for block in ("model.layers.0", "model.layers.1") for group in groups
    ]


def test_every_linear_layer_is_listed_with_its_shape(tmp_path: Path) -> None:
    decoder = blocks.skeleton(opened(tmp_path), CPU)
    shapes = decoder.linears()
    assert len(shapes) == 14
    assert shapes["model.layers.1.mlp.down_proj"] == (64, 128)
    assert shapes["model.layers.0.self_attn.k_proj"] == (32, 64)


def test_a_solver_sees_the_inputs_of_every_batch(tmp_path: Path) -> None:
    watching = Watching()
    walked(opened(tmp_path), rows(), watching)
    assert all(len(inputs) == 2 for inputs in watching.inputs)
    assert [tuple(part.shape) for part in watching.inputs[0]] == [(48, 64), (24, 64)]
    assert [tuple(part.shape) for part in watching.inputs[3]] == [(48, 128), (24, 128)]


def test_what_follows_already_sees_the_chosen_weights(tmp_path: Path) -> None:
    silencing = Silencing("self_attn.v_proj")
    _, states = walked(opened(tmp_path), rows(), silencing)
    of_o_proj = [
        inputs
        for (_, names), inputs in zip(silencing.visits, silencing.inputs, strict=True)
        if names == ["self_attn.o_proj"]
    ]
    assert len(of_o_proj) == 2
    assert all(bool((part == 0).all()) for inputs in of_o_proj for part in inputs)
    assert not torch.equal(states[0][-1], walked(opened(tmp_path), rows(), Watching())[1][0][-1])


def test_layers_compute_with_what_the_solver_says_they_see(tmp_path: Path) -> None:
    model = opened(tmp_path)
    plain, doubled = Watching(), Doubling()
    _, once = walked(model, rows(), plain)
    _, twice = walked(model, rows(), doubled)
    assert torch.equal(doubled.inputs[0][0], plain.inputs[0][0] * 2)
    assert not torch.allclose(once[0][1], twice[0][1])


def test_masked_tokens_are_neither_shown_nor_matter(tmp_path: Path) -> None:
    model = opened(tmp_path)
    seen = []
    for filler in (0, 7):
        given = rows()
        ids, mask = given[0][0].clone(), given[0][1].clone()
        ids[1, 10:], mask[1, 10:] = filler, False
        watching = Watching()
        walked(model, [(ids, mask), given[1]], watching)
        seen.append(watching.inputs)
    assert seen[0][0][0].shape[0] == 24 + 10
    for one, other in zip(*seen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_stream_gives_its_real_tokens_in_order() -> None:
    inputs = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert Stream(inputs, mask).real(inputs).tolist() == [[0, 1], [2, 3], [6, 7]]
    assert torch.equal(Stream(inputs, mask | True).real(inputs), inputs.view(6, 2))


def test_a_block_holds_its_weights_only_while_it_runs(tmp_path: Path) -> None:
    decoder, _ = walked(opened(tmp_path), rows(), Watching())
    assert {parameter.device.type for parameter in decoder.model.parameters()} == {"meta"}
    hooks = [m for m in decoder.model.modules() if m._forward_pre_hooks or "forward" in vars(m)]
    assert not hooks


class SolverFailed(Exception):
    pass


class Failing(Watching):
    def visit(
        self, decoder: Decoder, place: int, names: Sequence[str], inputs: Iterator[Tensor]
    ) -> None:
        super().visit(decoder, place, names, inputs)
        if names == ["mlp.down_proj"]:
            raise SolverFailed


def test_a_solver_that_fails_leaves_the_block_empty_and_without_hooks(tmp_path: Path) -> None:
    model = opened(tmp_path)
    decoder = blocks.skeleton(model, CPU)
    streams = blocks.embed(decoder, model, rows())
    with pytest.raises(SolverFailed):
        blocks.run(decoder, 0, model, streams, Failing())
    assert {parameter.device.type for parameter in decoder.model.parameters()} == {"meta"}
    assert not any(module._forward_pre_hooks for module in decoder.model.modules())


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2}, "holds no nn.Linear"),
        (
            "mixtral",
            {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "num_local_experts": 2,
            },
            "has 3 dimensions",
        ),
    ],
)
def test_blocks_that_cannot_be_solved_are_refused(
    kind: str, settings: dict[str, int], reason: str, tmp_path: Path
) -> None:
    config = CONFIG_MAPPING[kind](vocab_size=tiny.VOCAB, **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(SourceError, match=reason):
        blocks.skeleton(source.open(str(tmp_path), cache=tmp_path), CPU)
