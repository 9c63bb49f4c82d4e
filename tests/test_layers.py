"""`quant.layers`: what a layer lost is told truly, and one that cannot be solved is named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant import blocks, checkpoint, int8, source
from quant.artifact import LayerReport
from quant.blocks import Decoder
from quant.errors import SolveError
from quant.layers import Layers
from quant.recipe import Recipe, Scheme, choose_group_size
from quant.source import Source
from tests import tiny

CPU = torch.device("cpu")
BLOCK = "model.layers.0"
Q, K, V = (f"{BLOCK}.self_attn.{name}_proj" for name in "qkv")


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
        self.before: dict[str, Tensor] = {}
        self.after: dict[str, Tensor] = {}
        self.inputs: dict[str, Tensor] = {}

    def seen(self, inputs: Tensor) -> Tensor:
        return self._layers.seen(inputs)

    def visit(
        self, decoder: Decoder, place: int, names: Sequence[str], inputs: Iterator[Tensor]
    ) -> None:
        held = [rows.clone() for rows in inputs]
        full = {name: f"{decoder.prefix}{place}.{name}" for name in names}
        for name in names:
            self.before[full[name]] = decoder.linear(place, name).weight.clone()
            self.inputs[full[name]] = torch.cat(held)
        self._layers.visit(decoder, place, names, iter(held))
        for name in names:
            self.after[full[name]] = decoder.linear(place, name).weight.clone()


def opened(folder: Path, **tensors: Tensor | float) -> Source:
    """A tiny model, some of its tensors replaced or multiplied, by the end of their name."""
    tiny.model_folder(folder, tied=False)
    held = load_file(folder / "model.safetensors")
    for ending, change in tensors.items():
        for name in held:
            if name.endswith(ending.replace("__", ".")):
                held[name] = (held[name] * change).to(held[name].dtype)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return source.open(str(folder), cache=folder)


def solve_first_block(
    model: Source, recipe: Recipe, notes: Notes, *, real: int = 24
) -> tuple[Layers, Recording]:
    decoder = blocks.skeleton(model, CPU)
    shapes = decoder.linears()
    group = choose_group_size(recipe, (columns for _, columns in shapes.values()))
    layers = Layers(recipe, group, torch.bfloat16, shapes, notes)
    ids = torch.randint(4, tiny.VOCAB, (8, 24), generator=torch.Generator().manual_seed(5))
    mask = torch.arange(24).expand(8, 24) < real
    streams = blocks.embed(decoder, model, [(ids, mask)])
    recording = Recording(layers)
    blocks.run(decoder, 0, model, streams, recording)
    return layers, recording


@pytest.mark.parametrize("scheme", ["w4a16", "w8a16", "w8a8"])
def test_the_reported_loss_is_that_of_the_layers_outputs(scheme: Scheme, tmp_path: Path) -> None:
    layers, recording = solve_first_block(opened(tmp_path), Recipe(scheme=scheme), Notes())
    assert len(layers.reports) == 7
    for report in layers.reports:
        inputs = recording.inputs[report.name].double()
        before, after = recording.before[report.name], recording.after[report.name]
        error = (inputs @ (before - after).double().T).square().mean()
        energy = (inputs @ before.double().T).square().mean()
        assert report.loss == pytest.approx(float(error / energy), rel=1e-3)
        assert 0 < report.loss < 0.8 * report.rounding_loss
        assert report.damping == 0.01


def test_an_int8_layer_is_solved_for_the_inputs_it_will_see(tmp_path: Path) -> None:
    _, recording = solve_first_block(opened(tmp_path), Recipe(scheme="w8a8"), Notes())
    for inputs in recording.inputs.values():
        torch.testing.assert_close(int8.as_served(inputs), inputs)


@pytest.mark.parametrize("scheme", ["w4a16", "w8a16", "w8a8"])
def test_what_is_written_is_what_the_next_block_saw(scheme: Scheme, tmp_path: Path) -> None:
    model = opened(tmp_path)
    layers, recording = solve_first_block(model, Recipe(scheme=scheme), Notes())
    for name, weight in recording.after.items():
        tensors = dict(layers.encoded(model, f"{name}.weight"))
        assert all(key.startswith(f"{name}.") for key in tensors)
        kinds = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items()}
        layer = checkpoint.decode(scheme, kinds)
        assert torch.equal(layer.weight(), weight)
        assert layer.digest() == layers.digests[name]


def test_a_tensor_that_was_not_solved_passes_through(tmp_path: Path) -> None:
    model = opened(tmp_path)
    layers, _ = solve_first_block(model, Recipe(), Notes())
    name = f"{BLOCK}.input_layernorm.weight"
    assert torch.equal(dict(layers.encoded(model, name))[name], model.tensors.get(name))


def test_progress_counts_up_to_every_layer_of_the_model(tmp_path: Path) -> None:
    notes = Notes()
    solve_first_block(opened(tmp_path), Recipe(), notes)
    assert notes.done == [(done, 14) for done in range(1, 8)]
    assert notes.lines == []


def test_inputs_that_are_always_zero_are_reported(tmp_path: Path) -> None:
    notes, alive = Notes(), torch.ones(64)
    alive[[3, 40]] = 0
    solve_first_block(opened(tmp_path, input_layernorm__weight=alive), Recipe(), notes)
    assert notes.lines == [f"{Q}: 2 of 64 inputs are zero on every calibration token"]


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        ("input_layernorm__weight", "its inputs are all zero"),
        ("embed_tokens__weight", "its inputs are all zero"),
    ],
)
def test_zero_inputs_name_the_layers_that_share_them(
    tensor: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(SolveError) as caught:
        solve_first_block(opened(tmp_path, **{tensor: 0.0}), Recipe(), Notes())
    assert str(caught.value) == f"{Q} and {K} and {V} could not be solved: {reason}"


def test_non_finite_inputs_name_the_layers(tmp_path: Path) -> None:
    with pytest.raises(SolveError) as caught:
        solve_first_block(opened(tmp_path, embed_tokens__weight=torch.inf), Recipe(), Notes())
    assert (
        str(caught.value) == f"{Q} and {K} and {V} could not be solved: its inputs are not finite"
    )


def test_non_finite_weights_name_the_layer(tmp_path: Path) -> None:
    with pytest.raises(SolveError) as caught:
        solve_first_block(opened(tmp_path, down_proj__weight=torch.nan), Recipe(), Notes())
    named = f"{BLOCK}.mlp.down_proj could not be solved: its weights are not finite"
    assert str(caught.value) == named


def test_no_token_names_the_layers(tmp_path: Path) -> None:
    with pytest.raises(SolveError) as caught:
        solve_first_block(opened(tmp_path), Recipe(), Notes(), real=0)
    assert str(caught.value).endswith("could not be solved: no calibration token reached it")
    assert Q in str(caught.value)


@pytest.mark.parametrize("scheme", ["w4a16", "w8a16", "w8a8"])
def test_the_checkpoints_size_is_known_beforehand(scheme: Scheme, tmp_path: Path) -> None:
    model = opened(tmp_path)
    layers, _ = solve_first_block(model, Recipe(scheme=scheme), Notes())
    shapes = blocks.skeleton(model, CPU).linears()
    quantized = sum(
        checkpoint.layer_bytes(scheme, shape, layers.group) for shape in shapes.values()
    )
    others = [n for n in model.tensors.names() if n.removesuffix(".weight") not in shapes]
    kept = sum(layers.kept(model, name).nbytes for name in others)
    assert layers.bytes_after(model) == quantized + kept < 0.8 * model.bytes
