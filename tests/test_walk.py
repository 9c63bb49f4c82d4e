"""`solver.walk`: each family's block run twice, as served and as the parent, around a solver."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from quant.intake.source import Source
from quant.solver import aside, blocks, walk
from quant.solver.aside import Shelf
from quant.solver.blocks import Decoder
from quant.solver.walk import Group, Inputs
from tests import tiny
from tests.test_blocks import CPU, opened

pytestmark = pytest.mark.arithmetic

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
Rows = list[tuple[Tensor, Tensor]]


class Watching:
    """A solver that keeps every weight and remembers whom it visited with what."""

    scales_inputs = False

    def __init__(self) -> None:
        self.visits: list[tuple[str, list[str]]] = []
        self.inputs: list[list[Inputs]] = []
        self.feeds: dict[str, str | None] = {}

    def seen(self, _linear: nn.Linear, inputs: Tensor) -> Tensor:
        return inputs

    def visit(self, group: Group) -> None:
        self.visits.append((group.prefix, list(group.linears)))
        self.inputs.append(
            [
                Inputs(
                    i.served.clone(),
                    i.parent.clone(),
                    gap=i.gap if i.gap is None else i.gap.clone(),
                )
                for i in group.inputs
            ]
        )
        for name in group.linears:
            self.feeds[f"{group.prefix}{name}"] = None if group.feed is None else group.feed.name


class Silencing(Watching):
    """Sets the weights of layers of one name to zero."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def visit(self, group: Group) -> None:
        super().visit(group)
        if self.name in group.linears:
            group.linears[self.name].weight.zero_()


class Scrambling(Watching):
    """Puts noise in every weight's place, and layers compute with noisy inputs."""

    def seen(self, _linear: nn.Linear, inputs: Tensor) -> Tensor:
        return inputs + torch.randn_like(inputs)

    def visit(self, group: Group) -> None:
        super().visit(group)
        for linear in group.linears.values():
            linear.weight.normal_()


class Closing(Watching):
    """Halves every weight, and keeps those of layers alone in their group: before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[tuple[Tensor, Tensor]] = []

    def visit(self, group: Group) -> None:
        super().visit(group)
        before = [linear.weight.clone() for linear in group.linears.values()]
        for linear in group.linears.values():
            linear.weight.mul_(0.5)
        self.weights.append((before[0], before[0] / 2))


class Doubling(Watching):
    """Layers of one width compute with twice their inputs."""

    def seen(self, linear: nn.Linear, inputs: Tensor) -> Tensor:
        return inputs * 2 if linear.in_features == 128 else inputs


class Scaling(Watching):
    scales_inputs = True


class SolverFailed(Exception):
    pass


class Trying(Scrambling):
    """Asks before each group what the block would put out: as it is, and with the group silent."""

    def __init__(self) -> None:
        super().__init__()
        self.exact: list[Tensor] = []
        self.silenced: list[Tensor] = []

    def visit(self, group: Group) -> None:
        silent = {
            linear: partial(_nothing, width=linear.out_features)
            for linear in group.linears.values()
        }
        self.exact.append(group.outcome({}))
        self.silenced.append(group.outcome(silent))
        super().visit(group)


def _nothing(inputs: Tensor, width: int) -> Tensor:
    return inputs.new_zeros(*inputs.shape[:-1], width)


class Failing(Watching):
    def visit(self, group: Group) -> None:
        super().visit(group)
        if list(group.linears) == ["mlp.down_proj"]:
            raise SolverFailed


def rows(count: int = 3, length: int = 24) -> Rows:
    """Two batches of token rows, every token real."""
    ids = torch.randint(4, tiny.VOCAB, (count, length), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids, dtype=torch.bool)
    return [(ids[:2], mask[:2]), (ids[2:], mask[2:])]


def walked(
    model: Source,
    given: Rows,
    solver: walk.Solver,
    shelf: Shelf | None = None,
    on: Sequence[torch.device] = (CPU,),
) -> tuple[Decoder, list[list[Tensor]], list[list[Tensor]]]:
    """Hidden states of each batch, as served and the parent's: first and behind every block."""
    decoder = blocks.spread(model, on)
    streams, probe = blocks.embed(decoder, model, given, [shelf] * len(given))
    served = [[stream.hidden] for stream in streams]
    parents = [[stream.parent] for stream in streams]
    for place in range(len(decoder.blocks)):
        walk.run(decoder, place, model, (streams, probe), solver)
        for hidden, parent, stream in zip(served, parents, streams, strict=True):
            hidden.append(stream.hidden)
            parent.append(stream.parent)
    return decoder, served, parents


def assert_are_the_whole_models(states: list[list[Tensor]], folder: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for (ids, _), ours in zip(rows(), states, strict=True):
        with torch.no_grad():
            theirs = whole(ids, output_hidden_states=True, use_cache=False).hidden_states
            last = whole.model.norm(ours[-1])
        assert len(ours) == len(theirs)
        for mine, their in zip([*ours[:-1], last], theirs, strict=True):
            assert torch.equal(mine, their)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("solver", [Watching, Scaling])
def test_walking_all_blocks_is_what_the_whole_model_computes(
    family: str, solver: Callable[[], Watching], tmp_path: Path
) -> None:
    _, served, _ = walked(opened(tmp_path, family), rows(), solver())
    assert_are_the_whole_models(served, tmp_path)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_parents_stream_is_the_parents_whatever_the_solver_does(
    family: str, tmp_path: Path
) -> None:
    _, served, parents = walked(opened(tmp_path, family), rows(), Scrambling())
    assert_are_the_whole_models(parents, tmp_path)
    for hidden, parent in zip(served, parents, strict=True):
        assert all(not torch.allclose(a, b) for a, b in zip(hidden[1:], parent[1:], strict=True))


@pytest.mark.parametrize("family", sorted({*tiny.FAMILIES} - {"gemma3_text"}))
@pytest.mark.parametrize("on_disk", [False, True])
def test_the_gap_is_what_the_stream_lacks_where_a_layer_adds_to_it(
    family: str, tmp_path: Path, *, on_disk: bool
) -> None:
    solver = Closing()
    with aside.shelf(tmp_path) if on_disk else nullcontext() as kept:
        _, served, parents = walked(opened(tmp_path, family), rows(), solver, kept)
    last = [i for i, (_, names) in enumerate(solver.visits) if names == ["mlp.down_proj"]]
    for block, place in enumerate(last, start=1):
        before, after = solver.weights[place]
        for given, ours, theirs in zip(solver.inputs[place], served, parents, strict=True):
            assert given.gap is not None
            left = given.gap + given.parent @ before.T - given.served @ after.T
            behind = (theirs[block] - ours[block]).flatten(0, 1)
            torch.testing.assert_close(left, behind, rtol=1e-3, atol=1e-3)
    told = {names[0] for (_, names), given in zip(solver.visits, solver.inputs, strict=True)
            if given[0].gap is not None}  # fmt: skip
    assert told == {"self_attn.o_proj", "mlp.down_proj"}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_layers_that_share_an_input_are_found(family: str, tmp_path: Path) -> None:
    watching = Watching()
    walked(opened(tmp_path, family), rows(), watching)
    groups = FUSED if family == "phi3" else SEPARATE
    assert watching.visits == [
        (block, group) for block in ("model.layers.0.", "model.layers.1.") for group in groups
    ]


def test_a_solver_sees_the_inputs_of_every_batch(tmp_path: Path) -> None:
    watching = Watching()
    walked(opened(tmp_path), rows(), watching)
    assert all(len(inputs) == 2 for inputs in watching.inputs)
    for place, width in ((0, 64), (3, 128)):
        served, parent, *_ = zip(*watching.inputs[place], strict=True)
        assert [tuple(part.shape) for part in served] == [(48, width), (24, width)]
        assert [tuple(part.shape) for part in parent] == [(48, width), (24, width)]


def test_served_and_parent_are_the_same_until_a_weight_changes(tmp_path: Path) -> None:
    silencing = Silencing("self_attn.v_proj")
    walked(opened(tmp_path), rows(), silencing)
    first, *others = silencing.inputs
    assert all(torch.equal(given.served, given.parent) for given in first)
    for inputs in others:
        assert not any(torch.allclose(given.served, given.parent) for given in inputs)


def test_what_follows_already_sees_the_chosen_weights(tmp_path: Path) -> None:
    model, watching, silencing = opened(tmp_path), Watching(), Silencing("self_attn.v_proj")
    walked(model, rows(), watching)
    walked(model, rows(), silencing)
    of_o_proj = [place for place, (_, n) in enumerate(silencing.visits) if "o_proj" in n[0]]
    assert len(of_o_proj) == 2
    for place in of_o_proj:
        pairs = zip(silencing.inputs[place], watching.inputs[place], strict=True)
        for given, untouched in pairs:
            assert bool((given.served == 0).all())
            assert torch.equal(given.parent, untouched.parent)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_rows_on_several_devices_are_run_as_on_one(family: str, tmp_path: Path) -> None:
    model = opened(tmp_path, family)
    alone, together = (Silencing("mlp.down_proj") for _ in range(2))
    _, served, parents = walked(model, rows(), alone)
    decoder, *states = walked(model, rows(), together, on=(CPU, CPU))
    assert together.visits == alone.visits
    for found, expected in zip(states, (served, parents), strict=True):
        pairs = zip(chain(*found), chain(*expected), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    for copy in decoder.all():
        assert {parameter.device.type for parameter in copy.model.parameters()} == {"meta"}


def test_each_device_runs_its_share_and_sees_what_the_solver_says(tmp_path: Path) -> None:
    model = opened(tmp_path)
    decoder = blocks.spread(model, (CPU, CPU))
    (one, two), _ = blocks.embed(decoder, model, rows())
    assert (one.copy, two.copy) == (0, 1)
    _, alone, _ = walked(model, rows(), Doubling())
    _, together, _ = walked(model, rows(), Doubling(), on=(CPU, CPU))
    assert torch.equal(alone[1][2], together[1][2])


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.MIXTURES])
def test_what_waits_on_disk_is_what_would_wait_in_memory(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aside, "_LEAST", 0)
    model = opened(tmp_path, family)
    silencing, elsewhere = (Silencing("self_attn.v_proj") for _ in range(2))
    _, served, parents = walked(model, rows(), silencing)
    with aside.shelf(tmp_path) as shelf:
        _, *states = walked(model, rows(), elsewhere, shelf)
        assert shelf._end > sum(tensor.nbytes for batch in served for tensor in batch[:1])
    for found, expected in zip(states, (served, parents), strict=True):
        pairs = zip(chain(*found), chain(*expected), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    for ours, theirs in zip(chain(*elsewhere.inputs), chain(*silencing.inputs), strict=True):
        assert torch.equal(ours.served, theirs.served)
        assert torch.equal(ours.parent, theirs.parent)


class Weighing(Watching):
    """Notes the bytes of all activations in memory whenever an expert is to be solved."""

    def __init__(self) -> None:
        super().__init__()
        self.held = 0

    def visit(self, group: Group) -> None:
        if ".experts." in next(iter(group.linears)):
            found = (each for each in gc.get_objects() if issubclass(type(each), Tensor))
            storages = [tensor.untyped_storage() for tensor in found if not tensor.is_meta]
            held = {storage._cdata: storage.nbytes() for storage in storages}
            self.held = max(self.held, sum(held.values()))


def test_a_mixtures_experts_hold_no_more_of_more_tokens_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aside, "_LEAST", 0)
    model = opened(tmp_path, "mixtral")
    decoder, few, many = blocks.skeleton(model, CPU), rows(4, 96) * 2, rows(4, 96) * 8

    def held(given: Rows, shelf: Shelf | None) -> int:
        weighing = Weighing()
        walk.run(
            decoder, 0, model, blocks.embed(decoder, model, given, [shelf] * len(given)), weighing
        )
        return weighing.held

    in_memory = held(many, None) - held(few, None)
    with aside.shelf(tmp_path) as shelf:
        on_disk = held(many, shelf) - held(few, shelf)
    states = sum(ids.numel() for ids, _ in many[len(few) :]) * 64 * 4
    assert in_memory > 6 * states  # three of each stream's, at least
    assert on_disk < states  # samples of 64 tokens, positions, masks, which token goes where


def test_layers_compute_with_what_the_solver_says_they_see(tmp_path: Path) -> None:
    model = opened(tmp_path)
    _, once, parents = walked(model, rows(), Watching())
    doubling = Doubling()
    _, twice, still = walked(model, rows(), doubling)
    through = doubling.inputs[3][0]  # of the first down_proj: linear, so its output doubles
    assert torch.equal(through.served, through.parent)
    attended = opened_block_without_mlp(model)
    torch.testing.assert_close(
        twice[0][1] - attended, 2 * (once[0][1] - attended), rtol=1e-4, atol=1e-5
    )
    assert torch.equal(still[0][2], parents[0][2])


def opened_block_without_mlp(model: Source) -> Tensor:
    """The first batch behind block 0 whose last layer puts out nothing."""
    return walked(model, rows(), Silencing("mlp.down_proj"))[1][0][1]


def test_feeds_are_looked_for_only_where_the_solver_scales(tmp_path: Path) -> None:
    model, plain, scaling = opened(tmp_path), Watching(), Scaling()
    walked(model, rows(), plain)
    walked(model, rows(), scaling)
    assert set(plain.feeds.values()) == {None}
    assert scaling.feeds["model.layers.1.self_attn.k_proj"] == "input_layernorm"
    assert scaling.feeds["model.layers.1.mlp.down_proj"] == "mlp.up_proj"
    assert scaling.feeds["model.layers.1.self_attn.o_proj"] is None


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
    assert seen[0][0][0].served.shape[0] == seen[0][0][0].parent.shape[0] == 24 + 10
    for one, other in zip(*seen, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine[:2], theirs[:2], strict=True))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_tokens_that_do_not_count_are_attended_to_and_not_shown(
    family: str, tmp_path: Path
) -> None:
    model, every, some = opened(tmp_path, family), Watching(), Watching()
    counts = torch.zeros(3, 24, dtype=torch.bool)
    counts[0, 5:9] = counts[1, 20:] = counts[2, [3, 11]] = True
    given = rows()
    _, whole, _ = walked(model, given, every)
    answers = [(ids, mask) for (ids, _), mask in zip(given, torch.split(counts, 2), strict=True)]
    _, states, _ = walked(model, answers, some)
    assert all(torch.equal(a, b) for a, b in zip(chain(*states), chain(*whole), strict=True))
    assert [each.parent.shape[0] for each in some.inputs[0]] == [8, 2]
    for all_of_them, shown in zip(every.inputs[0], some.inputs[0], strict=True):
        mask = counts[:2] if len(all_of_them.parent) == 48 else counts[2:]
        assert torch.equal(shown.parent, all_of_them.parent[mask.flatten()])


def test_a_question_longer_than_the_sample_leaves_an_outcome_to_go_by(tmp_path: Path) -> None:
    """Of a row whose first tokens do not count, all that are looked at do."""
    solver, mask = Trying(), torch.zeros(3, 80, dtype=torch.bool)
    mask[:, 70:] = True
    walked(opened(tmp_path), [(ids, mask[: len(ids)]) for ids, _ in rows(length=80)], solver)
    for exact, silenced in zip(solver.exact, solver.silenced, strict=True):
        assert exact.shape == (2 * 64, 64) and exact.isfinite().all()
        assert not torch.allclose(silenced, exact, atol=1e-3)


def test_a_block_is_left_empty_and_as_it_was(tmp_path: Path) -> None:
    decoder, _, _ = walked(opened(tmp_path), rows(), Scaling())
    assert {parameter.device.type for parameter in decoder.model.parameters()} == {"meta"}
    modules = decoder.model.modules()
    assert not [m for m in modules if m._forward_pre_hooks or "forward" in vars(m)]


def test_a_solver_that_fails_leaves_the_block_empty_and_as_it_was(tmp_path: Path) -> None:
    model = opened(tmp_path)
    decoder = blocks.skeleton(model, CPU)
    streams = blocks.embed(decoder, model, rows())
    with pytest.raises(SolverFailed):
        walk.run(decoder, 0, model, streams, Failing())
    assert {parameter.device.type for parameter in decoder.model.parameters()} == {"meta"}
    modules = decoder.model.modules()
    assert not [m for m in modules if m._forward_pre_hooks or "forward" in vars(m)]


def test_an_outcome_is_the_parents_block_whatever_was_chosen_and_feels_what_stands_in(
    tmp_path: Path,
) -> None:
    solver = Trying()
    _, _, parents = walked(opened(tmp_path), rows(), solver)
    groups = len(solver.exact) // 2
    for place in range(2):
        meant = torch.cat([stream[place + 1][0] for stream in parents])
        for group in range(place * groups, (place + 1) * groups):
            torch.testing.assert_close(solver.exact[group], meant)
            assert not torch.allclose(solver.silenced[group], meant, atol=1e-3)
