"""`solver.allotment`: what is on offer, what a budget buys of it, and what it cannot buy."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from quant import artifact, checkpoint, formats, recipe
from quant.artifact import CalibrationReport
from quant.calibration import Batches
from quant.errors import RecipeError
from quant.formats import FULL, INT8, Format
from quant.intake import source
from quant.proof import card, replica
from quant.solver import allotment, blocks
from quant.solver.sensitivity import Unit
from tests import tiny
from tests.test_pipeline import Made, calibration_file, logits, quantize, shift

SHAPES = {"q": (96, 64), "k": (32, 64), "o": (64, 64), "down": (64, 128)}
TWO = Unit(("q", "k"), torch.ones(64), {Format(4, 64): 0.5, Format(4, 32): 0.2, FULL: 0.0})
ONE = Unit(("o",), torch.ones(64), {Format(4, 64): 0.01, Format(4, 32): 0.008, FULL: 0.0})
WIDE = Unit(("down",), torch.ones(128), {Format(4, 128): 0.4, Format(8, 128): 0.001, FULL: 0.0})


@pytest.mark.parametrize(
    ("scheme", "columns", "forms"),
    [
        ("w4a16", 1536, [Format(4, 128), Format(4, 64), Format(4, 32), Format(8, 128), FULL]),
        ("w4a16", 576, [Format(4, 64), Format(4, 32), Format(8, 64), FULL]),
        ("w4a16", 100, [Format(4, -1), Format(8, -1), FULL]),
        ("w8a8", 576, [INT8, FULL]),
    ],
)
def test_offers_fit_the_layer_and_grow(scheme: str, columns: int, forms: list[Format]) -> None:
    assert allotment.offered(scheme, columns) == forms
    sizes = [form.payload((100, columns)) for form in forms]
    assert sizes == sorted(sizes)


# A block whose sizes are no multiples of what a word holds, or of a group.
BLOCK = "model.layers.0"
ODD = {
    f"{BLOCK}.self_attn.q_proj": (160, 160),
    f"{BLOCK}.self_attn.k_proj": (20, 160),
    f"{BLOCK}.self_attn.v_proj": (20, 160),
    f"{BLOCK}.self_attn.o_proj": (160, 160),
    f"{BLOCK}.mlp.gate_proj": (80, 160),
    f"{BLOCK}.mlp.up_proj": (80, 160),
    f"{BLOCK}.mlp.down_proj": (160, 80),
}
ATTENTION = [f"{BLOCK}.self_attn.{leaf}_proj" for leaf in "qkv"]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, -1])
@pytest.mark.parametrize("shape", [(8, 64), (20, 64), (4, 128), (64, 100), (64, 80), (12, 96)])
def test_a_format_holds_what_can_be_written_in_it(
    bits: Literal[4, 8], group: int, shape: tuple[int, int]
) -> None:
    rows, columns = shape
    groups = 1 if group < 0 else columns // group
    codes = torch.zeros(rows, columns, dtype=torch.int8)
    form = Format(bits, group)
    if columns % max(group, 1):
        assert not form.holds(shape)
        return
    layer = checkpoint.Layer(codes, torch.ones(rows, groups))
    try:
        checkpoint.encode(form, layer, torch.bfloat16)
    except ValueError:
        assert not form.holds(shape)
    else:
        assert form.holds(shape)


def test_a_layer_that_fills_no_words_stays_full_with_all_that_is_loaded_with_it() -> None:
    said: list[str] = []
    plan = allotment.bound(recipe.build({}), ODD, said.append)
    assert [name for name in ODD if plan[name] == FULL] == ATTENTION
    assert {plan[name] for name in ODD if name not in ATTENTION} == {Format(4, 32), Format(4, -1)}
    rows, full = said
    assert rows.startswith("one scale for each row") and "1 layer, such as" in rows
    assert f"{BLOCK}.mlp.down_proj with 80 inputs" in rows
    assert full.startswith("full precision, since codes fill no whole words: 3 layers, such as")
    assert f"{BLOCK}.self_attn.k_proj with 160 inputs and 20 outputs" in full
    # In words of four codes they fit.
    assert FULL not in allotment.bound(recipe.build({"scheme": "w8a16"}), ODD).values()
    assert set(allotment.bound(recipe.build({"scheme": "w8a8"}), ODD).values()) == {INT8}


def test_a_mixture_has_one_format_though_one_expert_fills_no_words() -> None:
    experts = {
        f"{BLOCK}.mlp.experts.{place}.{leaf}_proj": shape
        for place, inner in enumerate((64, 60))
        for leaf, shape in {"gate": (inner, 128), "up": (inner, 128), "down": (128, inner)}.items()
    }
    plan = allotment.bound(recipe.build({}), SHAPES | experts)
    assert {plan[name] for name in experts} == {FULL}
    assert {plan[name] for name in SHAPES} == {Format(4, 64)}


def test_a_gate_and_an_up_projection_in_one_tensor_fill_words_each() -> None:
    """Of 100 outputs each: 200 would do."""
    fused = {f"{BLOCK}.mlp.gate_up_proj": (200, 64), f"{BLOCK}.mlp.down_proj": (64, 128)}
    plan = allotment.bound(recipe.build({}), fused)
    assert plan == {f"{BLOCK}.mlp.gate_up_proj": FULL, f"{BLOCK}.mlp.down_proj": Format(4, 64)}


def test_a_model_that_fills_no_words_at_all_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match=r"q with 100 inputs and 64 outputs.*; take w8a8"):
        allotment.bound(recipe.build({"group_size": -1}), {"q": (64, 100)})
    with pytest.raises(RecipeError, match="group size 32 does not divide the input width 100"):
        allotment.bound(recipe.build({"group_size": 32}), {"q": (64, 100)})


def test_a_budget_offers_a_layer_only_what_holds_it() -> None:
    said: list[str] = []
    offers = allotment.offers("w4a16", ODD | {f"{BLOCK}.mlp.odd": (64, 100)})
    assert [offers[name] for name in ATTENTION] == [[Format(8, 32), FULL]] * 3
    assert offers[f"{BLOCK}.mlp.odd"] == [Format(8, -1), FULL]
    wide = {"odd": (62, 100), **SHAPES}
    assert allotment.offers("w4a16", wide)["odd"] == [FULL]
    plan = allotment.bound(recipe.build({"bits_per_weight": 9}), wide, said.append)
    assert plan["odd"] == FULL and said[0].endswith(
        "odd with 100 inputs and 62 outputs, which 4-bit codes fill by 8"
    )


@pytest.mark.parametrize("bits", [4.4, 4.7, 5.5, 9.0, 15.9])
def test_no_plan_of_the_budget_is_larger_than_the_bound(bits: float) -> None:
    asked = recipe.build({"bits_per_weight": bits})
    assert formats.bits_per_weight(allotment.bound(asked, SHAPES), SHAPES) >= bits
    plan, _ = allotment.chosen([TWO, ONE, WIDE], SHAPES, bits)
    assert formats.bits_per_weight(plan, SHAPES) <= bits


def test_without_a_budget_all_layers_have_the_recipes_format() -> None:
    plan = allotment.bound(recipe.build({"group_size": 32}), SHAPES)
    assert plan == dict.fromkeys(SHAPES, Format(4, 32))


@pytest.mark.parametrize(
    ("scheme", "bits", "least"), [("w4a16", 4.2, "4.25"), ("w8a8", 8.3, "8.40")]
)
def test_a_budget_that_buys_nothing_names_the_least(scheme: str, bits: float, least: str) -> None:
    asked = {"scheme": scheme, "bits_per_weight": bits}
    with pytest.raises(RecipeError, match=rf"{bits} bits per weight are too few: .* take {least}"):
        allotment.bound(recipe.build(asked), SHAPES)
    enough = recipe.build({**asked, "bits_per_weight": float(least)})
    assert set(allotment.bound(enough, SHAPES)) == set(SHAPES)


def test_bits_go_where_they_save_the_most() -> None:
    plan, loss = allotment.chosen([TWO, ONE, WIDE], SHAPES, 6.0)
    assert plan == {"q": Format(4, 32), "k": Format(4, 32), "o": Format(4, 64),
                    "down": Format(8, 128)}  # fmt: skip
    assert loss == pytest.approx(0.2 + 0.01 + 0.001)


def test_layers_of_one_unit_have_one_format_at_every_budget() -> None:
    seen = set()
    for tenths in range(44, 161):
        plan, _ = allotment.chosen([TWO, ONE, WIDE], SHAPES, tenths / 10)
        assert plan["q"] == plan["k"]
        seen.add(plan["q"])
    assert seen == set(TWO.losses)


def rows(count: int, length: int = 32) -> Batches:
    ids = torch.randint(4, tiny.VOCAB, (count, length), generator=torch.Generator().manual_seed(5))
    report = CalibrationReport(digest="c" * 64, origin="file", samples=count, tokens=ids.numel())
    every = torch.ones_like(ids, dtype=torch.bool)
    return Batches(ids, every, every, report)


@pytest.mark.parametrize(("scheme", "bits"), [("w4a16", 5.0), ("w8a8", 10.0)])
def test_a_model_is_measured_and_the_plan_told(scheme: str, bits: float, tmp_path: Path) -> None:
    tiny.model_folder(tmp_path / "parent")
    model = source.open(str(tmp_path / "parent"), cache=tmp_path)
    decoder = blocks.skeleton(model, torch.device("cpu"))
    said: list[str] = []
    asked = recipe.build({"scheme": scheme, "bits_per_weight": bits})
    plan = allotment.within(asked, decoder, model, rows(14), said.append)
    assert plan.keys() == decoder.shapes().keys()
    used = formats.bits_per_weight(plan, decoder.shapes())
    assert bits - 0.5 < used <= bits
    assert len(set(plan.values())) > 1
    assert said[0].endswith("on 12 rows of the calibration")
    assert [line.split()[3] for line in said[1:-1]] == ["25%", "50%", "75%", "100%"]
    assert said[-1].startswith(f"{used:.2f} bits per weight: ") and "nats foreseen" in said[-1]
    for form in set(plan.values()):
        assert f"{list(plan.values()).count(form)} layer" in said[-1] and str(form) in said[-1]


@pytest.fixture(scope="module", params=[("w4a16", 5.5), ("w8a8", 10.0)], ids=str)
def mixed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    scheme, bits = request.param
    home = tmp_path_factory.mktemp(f"mixed-{scheme}")
    parent, texts = tiny.model_folder(home / "parent"), calibration_file(home)
    return quantize(parent, home / "out", scheme=scheme, texts=texts, bits_per_weight=bits)


def test_an_artifact_takes_what_it_was_allowed(mixed: Made) -> None:
    manifest, asked = mixed.manifest, mixed.manifest.recipe["bits_per_weight"]
    assert isinstance(asked, float) and manifest.bits_per_weight is not None
    assert asked - 0.6 < manifest.bits_per_weight <= asked
    names = [layer.name for layer in manifest.layers]
    payload = sum(
        tensor.nbytes
        for name, tensor in mixed.tensors.items()
        if name.rpartition(".")[0] in names and not name.endswith("g_idx")
    )
    parent = load_file(mixed.parent / "model.safetensors")
    weights = sum(parent[f"{name}.weight"].numel() for name in names)
    assert manifest.bits_per_weight == pytest.approx(8 * payload / weights)
    assert manifest.bytes_after == sum(tensor.nbytes for tensor in mixed.tensors.values())


def test_an_artifact_says_what_each_layer_is(mixed: Made) -> None:
    section = artifact.quantization_config(mixed.folder) or {}
    layers = mixed.manifest.layers
    for layer in layers:
        told = formats.of_layer(section, layer.name)
        assert (told.bits, told.group) == (layer.bits, layer.group)
    assert len({(layer.bits, layer.group) for layer in layers}) > 1
    page = (mixed.folder / card.NAME).read_text()
    assert card.scheme(mixed.manifest) in page and " bits per weight: " in page
    parent, ours = artifact.linear_shapes(mixed.parent), artifact.linear_shapes(mixed.folder)
    assert all(ours[layer.name] == parent[layer.name] for layer in layers)


def test_an_artifact_is_nearer_its_parent_than_the_next_uniform_one(mixed: Made) -> None:
    home, scheme = mixed.parent.parent, mixed.manifest.scheme
    smaller: dict[str, Any] = {"group_size": 32} if scheme == "w4a16" else {}
    texts = home / "texts.jsonl"
    uniform = quantize(mixed.parent, home / "uniform", scheme=scheme, texts=texts, **smaller)
    assert (uniform.manifest.bits_per_weight or 0) < (mixed.manifest.bits_per_weight or 0)
    opened = source.open(str(mixed.parent), cache=home / "cache")
    cpu = torch.device("cpu")
    expected = logits(replica.of_parent(opened, cpu), mixed.parent)
    ours, theirs = (
        shift(
            logits(replica.of_artifact(opened, made.folder, made.manifest, cpu), made.parent),
            expected,
        )
        for made in (mixed, uniform)
    )
    assert ours < 0.9 * theirs


def test_a_budget_out_of_reach_leaves_nothing(tmp_path: Path) -> None:
    parent, texts = tiny.model_folder(tmp_path / "parent"), calibration_file(tmp_path)
    with pytest.raises(RecipeError, match="are too few"):
        quantize(parent, tmp_path / "out", texts=texts, bits_per_weight=4.1)
    assert not (tmp_path / "out").exists()


def test_what_no_word_or_group_holds_is_left_in_full_precision(tmp_path: Path) -> None:
    """Outputs of 20, inputs of 100 and of 80: all that used to end behind the first block."""
    parent, texts = odd_model(tmp_path / "parent"), calibration_file(tmp_path)
    made = quantize(parent, tmp_path / "out", texts=texts)
    kept, before = made.tensors, load_file(parent / "model.safetensors")
    bits = {layer.name.rpartition(".")[2]: layer.bits for layer in made.manifest.layers}
    assert bits == {"o_proj": 4, **dict.fromkeys(("q_proj", "k_proj", "v_proj"), 16),
                    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 16)}  # fmt: skip
    for layer in made.manifest.layers:
        if layer.bits == 16:
            assert torch.equal(kept[f"{layer.name}.weight"], before[f"{layer.name}.weight"])
    assert sum(line.startswith("full precision") for line in made.told.lines) == 1
    budget = quantize(parent, tmp_path / "budget", texts=texts, bits_per_weight=12)
    assert {layer.bits for layer in budget.manifest.layers} > {8}


def odd_model(folder: Path) -> Path:
    tiny.tokenizer(folder)
    config = LlamaConfig(
        vocab_size=tiny.VOCAB, hidden_size=80, intermediate_size=100, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=1, head_dim=20, max_position_embeddings=128,
        initializer_range=0.05,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder
