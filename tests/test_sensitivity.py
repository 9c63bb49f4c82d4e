"""`solver.sensitivity`: what is predicted for a unit and a format is the KL that is then there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench.sensitivity import behind, true_kl
from quant.errors import SolveError
from quant.formats import FULL, INT8, Format
from quant.intake import source
from quant.intake.source import Source
from quant.solver import allotment, blocks, fisher, head, sensitivity
from quant.solver.sensitivity import Offers, Rows, Unit
from tests import tiny
from tests.test_selfcheck import folder

pytestmark = pytest.mark.arithmetic

CPU = torch.device("cpu")
ROWS, LENGTH = 8, 48  # of each stream
SHARPER = 30


def streams(real: int = LENGTH) -> Rows:
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(4, tiny.VOCAB, (3, ROWS, LENGTH), generator=draw)
    return [(each, (torch.arange(LENGTH) < real).expand(ROWS, LENGTH)) for each in ids]


def opened(folder: Path, family: str = "llama", *, tied: bool = False) -> Source:
    return source.open(str(sharpened(folder / "parent", family, tied=tied)), cache=folder)


def sharpened(folder: Path, family: str, *, tied: bool) -> Path:
    """A model that attends to few tokens: those that see the mean of all share their errors."""
    tiny.model_folder(folder, family, tied=tied)
    held = load_file(folder / "model.safetensors")
    for name, weight in held.items():
        if ".q_proj.weight" in name or ".q_norm.weight" in name:
            weight.mul_(SHARPER)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def measured(model: Source, scheme: str = "w4a16", rows: Rows | None = None) -> list[Unit]:
    decoder = blocks.skeleton(model, CPU)
    each = allotment.offers(scheme, decoder.shapes())
    offers = Offers(each, scheme == "w8a8", dtype=torch.bfloat16, damping=0.01)
    return sensitivity.measure(decoder, model, rows or streams(), offers, lambda _done, _of: None)


def plain(model: Source) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32).eval()


def measured_kl(model: Source, units: list[Unit], unit: Unit, form: Format) -> float:
    """Of the whole model with one unit's layers stored in a format, the others as they are but for
    the one that makes up for it."""
    return true_kl(plain(model), unit, behind(units, unit), form, streams())[0]


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("gemma3_text", False)])
def test_the_prediction_is_the_kl_of_storing_that_unit_so(
    family: str, tmp_path: Path, *, tied: bool
) -> None:
    model = opened(tmp_path, family, tied=tied)
    units = measured(model)
    assert [len(unit.names) for unit in units] == [3, 1, 2, 1] * 2
    told, true = [], []
    for unit in units:
        form = next(iter(unit.losses))
        told.append(unit.losses[form])
        true.append(measured_kl(model, units, unit, form))
    ratios = [one / other for one, other in zip(told, true, strict=True)]
    # A draw for each of 384 tokens, some of which count for much; and what they share is left out.
    assert min(ratios) > 0.65 and max(ratios) < 1.35
    assert sum(told) == pytest.approx(sum(true), rel=0.2)
    assert max(true) > 4 * min(true), "nothing to tell apart"


@pytest.mark.parametrize("kind", ["llama", "falcon", "gemma4_text"])
def test_what_is_sent_back_is_of_the_models_own_logits(kind: str, tmp_path: Path) -> None:
    """Whose blocks put out states, or tuples, or get embeddings of their own."""
    model = source.open(str(folder(tmp_path / "parent", kind)), cache=tmp_path)
    decoder, whole = blocks.skeleton(model, CPU), plain(model)
    (stream,), _ = blocks.embed(decoder, model, streams()[:1])
    states: list[Tensor] = []
    whole.get_submodule(f"{decoder.prefix}{len(decoder.blocks) - 1}").register_forward_hook(
        lambda _block, _given, out: states.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        expected = whole(input_ids=streams()[0][0], use_cache=False).logits
    stream.hidden = states[0]
    with head.filled(decoder, model):
        found = head.logits(decoder, stream.hidden)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert fisher.gradient(decoder, model, stream).abs().sum() > 0


def test_int8_units_are_weighed_with_their_inputs_rounded(tmp_path: Path) -> None:
    model = opened(tmp_path)
    units = measured(model, "w8a8")
    for unit in units[1::4]:  # o_proj, which nothing smooths
        assert torch.equal(unit.smoothing, torch.ones_like(unit.smoothing))
        true = measured_kl(model, units, unit, INT8)
        assert unit.losses[INT8] == pytest.approx(true, rel=0.5)
        # Weights alone lose a fraction of that.
        assert true > 1.3 * measured_kl(model, units, unit, Format(8))


def test_what_norms_can_smooth_is_weighed_smoothed(tmp_path: Path) -> None:
    folder = tiny.model_folder(tmp_path / "parent", tied=False)
    tiny.plant_outliers(folder)
    model = source.open(str(folder), cache=tmp_path)
    units = measured(model, "w8a8")
    assert not torch.equal(units[0].smoothing, torch.ones_like(units[0].smoothing))
    assert units[0].losses[INT8] < 0.3 * measured_kl(model, units, units[0], INT8)


def test_full_precision_costs_nothing_and_bits_are_worth_their_bytes(tmp_path: Path) -> None:
    for unit in measured(opened(tmp_path)):
        forms = list(unit.losses)
        assert forms[-1] == FULL and unit.losses[FULL] == 0
        eight = next(form for form in forms if form.bits == 8)
        fours = [unit.losses[form] for form in forms if form.bits == 4]
        assert 0 < unit.losses[eight] < 0.05 * min(fours)
        assert fours == sorted(fours, reverse=True)


def test_nothing_is_fitted_to_the_stream_that_judges(tmp_path: Path) -> None:
    model = opened(tmp_path)
    judge, *fitted = streams()
    other = judge[0].flip(0).flip(1), judge[1]
    for one, unit in zip(measured(model), measured(model, rows=[other, *fitted]), strict=True):
        coarse, fine = Format(4, 64), Format(4, 32)
        assert one.losses[coarse] != unit.losses[coarse]
        finer = [each.losses[fine] / each.losses[coarse] for each in (one, unit)]
        assert finer[0] == pytest.approx(finer[1])


def test_padding_counts_for_nothing(tmp_path: Path) -> None:
    model = opened(tmp_path)
    short = [(ids[:, :30], mask[:, :30]) for ids, mask in streams()]
    cut, padded = measured(model, rows=short), measured(model, rows=streams(real=30))
    for one, other in zip(cut, padded, strict=True):
        for form, loss in one.losses.items():
            assert other.losses[form] == pytest.approx(loss, rel=0.02)


def test_the_same_is_measured_twice(tmp_path: Path) -> None:
    model = opened(tmp_path)
    one, other = measured(model), measured(model)
    assert [unit.losses for unit in one] == [unit.losses for unit in other]


def test_layers_that_cannot_be_solved_are_named(tmp_path: Path) -> None:
    folder = tiny.model_folder(tmp_path / "parent", tied=False)
    held = load_file(folder / "model.safetensors")
    held["model.layers.1.post_attention_layernorm.weight"].fill_(3e38)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    named = r"^model\.layers\.1\.mlp\.gate_proj and .*up_proj could not be solved: its inputs"
    with pytest.raises(SolveError, match=named):
        measured(source.open(str(folder), cache=tmp_path))
