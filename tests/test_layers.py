"""`solver.layers`: what a layer lost is told truly, and one that cannot be solved is named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from quant import checkpoint, formats
from quant.artifact import LayerReport
from quant.errors import SolveError, SourceError
from quant.formats import FULL, INT8, Format, Plan
from quant.intake import source
from quant.intake.source import Source
from quant.recipe import Recipe, Scheme, choose_group_size
from quant.solver import blocks, descent, gptq, grid, int8, walk
from quant.solver.blocks import Stream
from quant.solver.layers import Layers, levels
from quant.solver.moments import Moments
from quant.solver.walk import Group, Inputs
from tests import tiny
from tests.test_gptq import plainly_rounded

pytestmark = pytest.mark.arithmetic

CPU = torch.device("cpu")
BLOCK = "model.layers.0"
Q, K, V, OUT = (f"{BLOCK}.self_attn.{name}_proj" for name in "qkvo")


class Notes:
    """What the progress was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.done: list[tuple[int, int]] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def solved(self, report: LayerReport, done: int, total: int) -> None:
        assert report.name
        self.done.append((done, total))


class Recording:
    """Passes every visit on to the layers, and keeps the weights and inputs before and after."""

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self.scales_inputs = layers.scales_inputs
        self.before: dict[str, Tensor] = {}
        self.after: dict[str, Tensor] = {}
        self.inputs: dict[str, Inputs] = {}  # as the layer computes with them, and the parent's
        self.groups: list[list[str]] = []

    def seen(self, linear: nn.Linear, inputs: Tensor) -> Tensor:
        return self._layers.seen(linear, inputs)

    def visit(self, group: Group) -> None:
        names = {f"{group.prefix}{name}": linear for name, linear in group.linears.items()}
        self.before |= {name: linear.weight.clone() for name, linear in names.items()}
        self.groups.append(list(names))
        self._layers.visit(group)
        for name, linear in names.items():
            self.after[name] = linear.weight.clone()
            served = torch.cat([self.seen(linear, given.served) for given in group.inputs])
            parent = torch.cat([given.parent for given in group.inputs])
            gaps = [given.gap for given in group.inputs if given.gap is not None]
            self.inputs[name] = Inputs(served, parent, gap=torch.cat(gaps) if gaps else None)


def opened(
    folder: Path,
    changes: Mapping[str, Tensor | float] | None = None,
    *,
    family: str = "llama",
    outliers: bool = False,
) -> Source:
    """A tiny model; `changes` multiply some of its tensors, by the end of their name."""
    tiny.model_folder(folder, family, tied=False)
    if outliers:
        tiny.plant_outliers(folder)
    held = load_file(folder / "model.safetensors")
    for ending, change in (changes or {}).items():
        for name in held:
            if name.endswith(ending):
                held[name] = (held[name] * change).to(held[name].dtype)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return source.open(str(folder), cache=folder)


def solve_blocks(
    model: Source,
    recipe: Recipe,
    notes: Notes,
    *,
    real: int = 24,
    count: int = 1,
    smooth: bool = True,
    other: Plan | None = None,
) -> tuple[Layers, Recording, Stream]:
    """The layers of the first `count` blocks solved, and the stream behind them.

    `other` names layers that are not in the recipe's own format.
    """
    decoder = blocks.skeleton(model, CPU)
    shapes = decoder.shapes()
    group = choose_group_size(recipe, (columns for _, columns in shapes.values()))
    plan = dict.fromkeys(shapes, formats.of_scheme(recipe.scheme, group)) | dict(other or {})
    layers = Layers(recipe, plan, torch.bfloat16, shapes, notes)
    layers.scales_inputs &= smooth
    ids = torch.randint(4, tiny.VOCAB, (16, 24), generator=torch.Generator().manual_seed(5))
    mask = torch.arange(24).expand(16, 24) < real
    streams = blocks.embed(decoder, model, [(ids, mask)])
    recording = Recording(layers)
    for place in range(count):
        walk.run(decoder, place, model, streams, recording)
    return layers, recording, streams[0][0]


def moments_of(inputs: Inputs, weight: Tensor) -> tuple[Moments, Moments]:
    """Of the tokens fitted to, and of the last eighth, which is held out."""
    (even,) = descent.evening([inputs.parent])
    read = [inputs.served * even, inputs.parent * even]
    if inputs.gap is not None:
        (level,) = descent.evening([inputs.gap * even])
        read.append(inputs.gap * even * level)
    last = len(even) - len(even) // 8
    fitted, held = (Moments(weight, adds=inputs.gap is not None) for _ in range(2))
    fitted.add(*(each[:last] for each in read))
    held.add(*(each[last:] for each in read))
    return fitted, held


def target_of(weight: Tensor, fitted: Moments, held: Moments) -> Tensor:
    """What a layer is solved for: moved by the gap of a stream it adds to, then by the drift."""
    target = weight
    for asked, damping in ((fitted.lack(), 0.1), (fitted.pull(), 0.01)):
        if len(asked):
            factor = gptq.factorize(fitted.hessian.mean(), damping, -1)
            target = descent.shifted(weight, target, asked, held, factor)
    return target


def test_rows_solved_a_few_at_a_time_are_what_they_are_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened(tmp_path)
    _, together, _ = solve_blocks(model, Recipe(), Notes())
    monkeypatch.setitem(descent.PART, "cpu", 64 * 10)
    _, apart, _ = solve_blocks(model, Recipe(), Notes())
    for name in together.groups[0]:  # whose inputs are the parent's: no target moves
        same = apart.after[name] == together.after[name]
        assert float(same.float().mean()) > 0.99, name  # sums of another shape break ties anew


@pytest.mark.parametrize("scheme", ["w4a16", "w8a16"])
def test_the_reported_loss_is_that_of_the_layers_outputs(scheme: Scheme, tmp_path: Path) -> None:
    layers, recording, _ = solve_blocks(opened(tmp_path), Recipe(scheme=scheme), Notes())
    reports = {report.name: report for report in layers.reports}
    assert list(reports) == [name for group in recording.groups for name in group]
    for group in recording.groups:
        before = [recording.before[name] for name in group]
        weights = torch.cat(before)
        fitted, held = moments_of(recording.inputs[group[0]], weights)
        targets = target_of(weights, fitted, held)
        given = recording.inputs[group[0]]
        (even,) = descent.evening([given.parent])
        inputs = (given.served * even)[: fitted.hessian.tokens].double()
        parts = zip(group, before, torch.split(targets, [len(w) for w in before]), strict=True)
        for name, weight, target in parts:
            error = (inputs @ (target - recording.after[name]).double().T).square().mean()
            energy = (inputs @ weight.double().T).square().mean()
            report = reports[name]
            assert report.loss == pytest.approx(float(error / energy), rel=1e-3)
            assert 0 < report.loss < 0.9 * report.rounding_loss
            assert report.damping == 0.01


def test_a_layer_makes_up_for_what_those_before_it_lost(tmp_path: Path) -> None:
    """Solved for its own weight, its outputs would be further from what they should be: the
    parent's, and where they are added to a stream, what that lacks beside."""
    layers, recording, _ = solve_blocks(opened(tmp_path), Recipe(), Notes(), count=2)
    levels, nearer = grid.full_range(4, torch.bfloat16), []
    for name, inputs in recording.inputs.items():
        weight = recording.before[name]
        fitted, held = moments_of(inputs, weight)
        factor = gptq.factorize(fitted.hessian.mean(), 0.01, layers.plan[Q].group)
        alone = gptq.solve(weight, fitted.hessian.mean(), factor, layers.plan[Q].group, levels)
        alone = descent.improved(weight, alone, (fitted.hessian.mean(), held), levels)
        (even,) = descent.evening([inputs.parent])
        meant = inputs.parent @ weight.T + (0 if inputs.gap is None else inputs.gap)
        ours, theirs = (
            float((even * (inputs.served @ made.T - meant)).square().sum())
            for made in (recording.after[name], alone.weight())
        )
        nearer.append(ours / theirs)
    assert nearer[:3] == [1.0, 1.0, 1.0]  # the first layers' inputs are the parent's
    # Where held-out tokens deny it, a layer is solved for its own weight.
    assert max(nearer[3:]) <= 1.0 and sum(ratio < 0.95 for ratio in nearer[3:]) > 8


@pytest.mark.parametrize("smoothed", [{"smooth": True}, {"smooth": False}], ids=str)
def test_an_int8_layer_is_solved_for_the_inputs_it_will_see(
    smoothed: dict[str, bool], tmp_path: Path
) -> None:
    recipe, notes = Recipe(scheme="w8a8"), Notes()
    _, recording, _ = solve_blocks(opened(tmp_path), recipe, notes, smooth=smoothed["smooth"])
    for served, *_ in recording.inputs.values():
        torch.testing.assert_close(int8.as_served(served), served)


MIXED: dict[Scheme, Plan] = {
    "w4a16": {Q: Format(8, 32), K: Format(8, 32), V: Format(8, 32), OUT: FULL,
              f"{BLOCK}.mlp.down_proj": Format(4, 128)},
    "w8a16": {},
    "w8a8": {OUT: FULL, f"{BLOCK}.mlp.gate_proj": FULL, f"{BLOCK}.mlp.up_proj": FULL},
}  # fmt: skip


@pytest.mark.parametrize("mixed", [False, True], ids=["uniform", "mixed"])
@pytest.mark.parametrize("scheme", ["w4a16", "w8a16", "w8a8"])
def test_what_is_written_is_what_the_next_block_saw(
    scheme: Scheme, tmp_path: Path, *, mixed: bool
) -> None:
    model = opened(tmp_path)
    other = MIXED[scheme] if mixed else {}
    layers, recording, _ = solve_blocks(model, Recipe(scheme=scheme), Notes(), other=other)
    reports = {report.name: report for report in layers.reports}
    for name, weight in recording.after.items():
        form = layers.plan[name]
        assert (reports[name].bits, reports[name].group) == (form.bits, form.group)
        if form == FULL:
            assert dict(layers.encoded(model, f"{name}.weight"))[f"{name}.weight"].equal(
                model.tensors.get(f"{name}.weight")
            )
            assert weight.equal(model.tensors.get(f"{name}.weight").float())
            continue
        tensors = dict(layers.encoded(model, f"{name}.weight"))
        assert all(key.startswith(f"{name}.") for key in tensors)
        kinds = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items()}
        layer = checkpoint.decode(layers.plan[name], kinds)
        assert layer.digest() == layers.digests[name]
        if scheme != "w8a8" or not name.endswith("up_proj"):  # it divides for the next layer
            assert torch.equal(layer.weight(), weight)


def served_model(model: Source, layers: Layers) -> PreTrainedModel:
    """What a server loads, its linear layers with int8 inputs."""
    state: dict[str, Tensor] = {}
    for name in model.tensors.names():
        made = dict(layers.encoded(model, name))
        module = name.removesuffix(".weight")
        if f"{module}.weight_scale" in made:
            kinds = {key.rpartition(".")[2]: tensor for key, tensor in made.items()}
            made = {name: checkpoint.decode(layers.plan[module], kinds).weight()}
        state |= made
    built = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32).eval()
    built.load_state_dict(state)
    return built


@torch.no_grad()
def behind_the_blocks(built: PreTrainedModel, *, rounds: bool) -> Tensor:
    """Hidden states before the last norm, of the rows that `solve_blocks` walks."""
    for module in built.model.layers.modules() if rounds else ():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args: (int8.as_served(args[0]),))
    hidden: list[Tensor] = []
    built.model.norm.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    ids = torch.randint(4, tiny.VOCAB, (16, 24), generator=torch.Generator().manual_seed(5))
    built(ids, use_cache=False)
    return hidden[0]


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).square().sum() / other.square().sum())


def test_a_full_layer_among_int8_ones_sees_its_inputs_as_they_are(tmp_path: Path) -> None:
    model = opened(tmp_path, outliers=True)
    recipe, other = Recipe(scheme="w8a8"), MIXED["w8a8"]
    layers, recording, stream = solve_blocks(model, recipe, Notes(), count=2, other=other)
    for name in other:
        served = recording.inputs[name].served
        assert not torch.allclose(int8.as_served(served), served)
    written = served_model(model, layers)
    for name, module in written.named_modules():
        if layers.plan.get(name) == INT8:
            module.register_forward_pre_hook(lambda _, args: (int8.as_served(args[0]),))
    lost = apart(stream.hidden, stream.parent)
    assert apart(behind_the_blocks(written, rounds=False), stream.hidden) < 0.2 * lost


W8A8_FAMILIES = ("llama", "qwen2", "gemma3_text", "phi3")


@pytest.mark.parametrize("family", W8A8_FAMILIES)
def test_what_was_folded_away_is_computed_by_what_is_written(family: str, tmp_path: Path) -> None:
    """Norms and layers that divide are stored so: the written model is the served stream."""
    model = opened(tmp_path, family=family, outliers=True)
    layers, _, stream = solve_blocks(model, Recipe(scheme="w8a8"), Notes(), count=2)
    written = behind_the_blocks(served_model(model, layers), rounds=True)
    lost = apart(stream.hidden, stream.parent)
    # A value between two steps may fall to either side, by float32's own rounding.
    assert apart(written, stream.hidden) < 0.2 * lost


@pytest.mark.parametrize("family", W8A8_FAMILIES)
def test_smoothing_keeps_a_model_with_outliers_near_its_parent(family: str, tmp_path: Path) -> None:
    model = opened(tmp_path, family=family, outliers=True)
    lost = {}
    for smooth in (True, False):
        recipe = Recipe(scheme="w8a8")
        _, _, stream = solve_blocks(model, recipe, Notes(), count=2, smooth=smooth)
        lost[smooth] = apart(stream.hidden, stream.parent)
    assert lost[True] < 0.3 * lost[False]


def test_only_what_feeds_a_layer_is_folded(tmp_path: Path) -> None:
    model = opened(tmp_path, family="gemma3_text", outliers=True)
    layers, _, _ = solve_blocks(model, Recipe(scheme="w8a8"), Notes())
    changed = {
        name
        for name in model.tensors.names()
        if name.startswith(f"{BLOCK}.") and "norm" in name
        if not torch.equal(layers.kept(model, name), model.tensors.get(name))
    }
    norms = ("input_layernorm", "pre_feedforward_layernorm")
    assert changed == {f"{BLOCK}.{name}.weight" for name in norms}


def test_a_tensor_that_was_not_solved_passes_through(tmp_path: Path) -> None:
    model = opened(tmp_path)
    layers, _, _ = solve_blocks(model, Recipe(), Notes())
    name = f"{BLOCK}.input_layernorm.weight"
    assert torch.equal(dict(layers.encoded(model, name))[name], model.tensors.get(name))


def test_progress_counts_up_to_every_layer_of_the_model(tmp_path: Path) -> None:
    notes = Notes()
    solve_blocks(opened(tmp_path), Recipe(), notes)
    assert notes.done == [(done, 14) for done in range(1, 8)]
    assert notes.lines == []


def test_inputs_that_are_always_zero_are_reported(tmp_path: Path) -> None:
    notes, alive = Notes(), torch.ones(64)
    alive[[3, 40]] = 0
    solve_blocks(opened(tmp_path, {"input_layernorm.weight": alive}), Recipe(), notes)
    assert notes.lines == [f"{Q}: 2 of 64 inputs are zero on every calibration token"]


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8"])
@pytest.mark.parametrize(
    "tensor", ["input_layernorm.weight", "v_proj.weight", "embed_tokens.weight"]
)
def test_layers_whose_inputs_are_all_zero_are_rounded_and_told(
    tensor: str, scheme: Scheme, tmp_path: Path
) -> None:
    """A pruned model has them; whatever their weights, it computes the same."""
    notes, model = Notes(), opened(tmp_path, {tensor: 0.0})
    layers, recording, stream = solve_blocks(model, Recipe(scheme=scheme), notes, count=2)
    dead = {line.partition(":")[0] for line in notes.lines}
    leader = {"v_proj.weight": f"{BLOCK}.self_attn.o_proj"}.get(tensor, Q)
    assert leader in dead
    assert all(
        line.endswith("on every calibration token; rounded to nearest") for line in notes.lines
    )
    assert len(layers.reports) == 14
    for report in layers.reports:
        form = layers.plan[report.name]
        if report.name in dead:
            assert (report.loss, report.rounding_loss, report.damping) == (0, 0, 0)
            grid = levels(form, torch.bfloat16)
            before, after = recording.before[report.name], recording.after[report.name]
            assert torch.equal(after, plainly_rounded(before, form.group, grid))
    if scheme == "w8a8" and tensor == "v_proj.weight":  # no norm is folded for what reads zeros
        written = behind_the_blocks(served_model(model, layers), rounds=True)
        assert apart(written, stream.hidden) < 0.2 * apart(stream.hidden, stream.parent)


def test_a_tensor_that_its_dtype_cannot_hold_is_named(tmp_path: Path) -> None:
    """Norms, heads and embeddings are copied: a server would multiply with infinity."""
    tiny.model_folder(tmp_path, dtype=torch.float32)
    held = load_file(tmp_path / "model.safetensors")
    held["model.norm.weight"][3] = 1e5
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = source.open(str(tmp_path), cache=tmp_path)
    shapes = blocks.skeleton(model, CPU).shapes()
    for dtype, fits in ((torch.bfloat16, True), (torch.float16, False)):
        layers = Layers(Recipe(), dict.fromkeys(shapes, FULL), dtype, shapes, Notes())
        if fits:
            assert layers.kept(model, "model.norm.weight").dtype == dtype
            continue
        with pytest.raises(SourceError, match=r"model\.norm\.weight .*not finite in float16"):
            layers.kept(model, "model.norm.weight")


def test_layers_of_two_formats_that_read_one_input_are_solved_apart(tmp_path: Path) -> None:
    model = opened(tmp_path)
    mixed, _, _ = solve_blocks(model, Recipe(), Notes(), other={K: FULL, V: Format(8, 32)})
    plain, _, _ = solve_blocks(model, Recipe(), Notes())
    assert mixed.digests.keys() == plain.digests.keys() == set()
    told = {report.name: (report.bits, report.group) for report in mixed.reports}
    assert (told[Q], told[K], told[V]) == ((4, 64), (16, -1), (8, 32))
    q = dict(mixed.encoded(model, f"{Q}.weight"))[f"{Q}.qweight"]
    assert torch.equal(q, dict(plain.encoded(model, f"{Q}.weight"))[f"{Q}.qweight"])
    k = dict(mixed.encoded(model, f"{K}.weight"))
    assert torch.equal(k[f"{K}.weight"], model.tensors.get(f"{K}.weight"))


def spoiled(folder: Path, ending: str, value: float) -> Source:
    """A model whose file changed once it was opened, which looks at every number."""
    model = opened(folder)
    held = load_file(folder / "model.safetensors")
    changed = {name: t * value if name.endswith(ending) else t for name, t in held.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return model


def test_non_finite_inputs_name_the_layers(tmp_path: Path) -> None:
    with pytest.raises(SolveError) as caught:
        solve_blocks(spoiled(tmp_path, "embed_tokens.weight", torch.inf), Recipe(), Notes())
    assert (
        str(caught.value) == f"{Q} and {K} and {V} could not be solved: its inputs are not finite"
    )


def test_non_finite_weights_name_the_layer(tmp_path: Path) -> None:
    with pytest.raises(SolveError) as caught:
        solve_blocks(spoiled(tmp_path, "down_proj.weight", torch.nan), Recipe(), Notes())
    named = f"{BLOCK}.mlp.down_proj could not be solved: its weights are not finite"
    assert str(caught.value) == named


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8"])
def test_no_token_names_the_layers(scheme: Scheme, tmp_path: Path) -> None:
    with pytest.raises(SolveError) as caught:
        solve_blocks(opened(tmp_path), Recipe(scheme=scheme), Notes(), real=0)
    assert str(caught.value).endswith("could not be solved: no calibration token reached it")
    assert Q in str(caught.value)


@pytest.mark.parametrize("scheme", ["w4a16", "w8a16", "w8a8"])
def test_the_checkpoints_size_is_known_beforehand(scheme: Scheme, tmp_path: Path) -> None:
    model = opened(tmp_path)
    layers, _, _ = solve_blocks(model, Recipe(scheme=scheme), Notes())
    shapes = blocks.skeleton(model, CPU).shapes()
    quantized = sum(layers.plan[name].stored(shape) for name, shape in shapes.items())
    others = [n for n in model.tensors.names() if n.removesuffix(".weight") not in shapes]
    kept = sum(layers.kept(model, name).nbytes for name in others)
    assert layers.bytes_after(model) == quantized + kept < 0.8 * model.bytes
