"""How an adapter was trained decides what `quantize` merges, as it does what `merge` writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from quant import artifact, command, recipe
from quant.artifact import TrainingBase
from quant.cli import app
from quant.errors import CompareError, QuantError
from quant.intake import source
from quant.lora import adapter as lora
from quant.lora import blend, export, nf4, starts
from quant.lora.compensate import Compensation
from quant.lora.mixture import Mixture
from quant.lora.training import Training
from quant.proof import card, compare, ways
from tests import tiny, variants
from tests.test_export import Heard
from tests.test_pipeline import Made, calibration_file, letters, quantize
from tests.test_ways import Told

RANDOM = "pissa_niter_2"  # a start that no base tells


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with variants.one_thread():
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent, a plain adapter, and one whose start lies elsewhere."""
    folder = tmp_path_factory.mktemp("training")
    parent = variants.base_folder(folder / "parent")
    variants.trained(folder / "lora", parent, targets=("q_proj", "v_proj"))
    variants.trained(folder / "shifted", parent, init_lora_weights=RANDOM)
    shutil.move(folder / "pissa_init", folder / "begun")
    calibration_file(folder)
    (folder / "book.txt").write_text("\n".join(letters(seed=5)))
    return folder


def quantized(home: Path, target: Path, name: str, **asked: Any) -> Made:
    texts = home / "texts.jsonl"
    more = {"adapters": (home / name,), "texts": texts, "samples": 8, "group_size": 32, **asked}
    return quantize(home / "parent", target, **more)


@pytest.fixture(scope="module")
def qlora(home: Path) -> Made:
    return quantized(home, home / "qlora-w4a16", "lora", training=Training("nf4"))


@pytest.fixture(scope="module")
def undone(home: Path) -> Made:
    begun = Training(initial=home / "begun")
    return quantized(home, home / "shifted-w4a16", "shifted", training=begun)


@pytest.mark.parametrize("base", ["nf4", "nf4-double"])
def test_every_linear_layer_is_read_as_training_saw_it(home: Path, base: TrainingBase) -> None:
    plain = source.open(str(home / "parent")).tensors
    seen = source.open(str(home / "parent"), training=Training(base)).tensors
    for name in plain.names():
        inside = name.endswith("_proj.weight")
        stored = plain.get(name)
        expected = nf4.round_trip(stored, double=base == "nf4-double") if inside else stored
        assert torch.equal(seen.get(name), expected) and seen.is_changed(name) == inside
        assert seen.dtype(name) == seen.get(name).dtype


@pytest.mark.parametrize(
    ("name", "training"),
    [
        ("lora", Training("nf4")),
        ("lora", Training("nf4-double")),
        ("shifted", Training("residual")),
        ("shifted", Training()),
    ],
    ids=["nf4", "nf4-double", "residual", "initial"],
)
def test_merging_on_the_way_is_merging_first(
    home: Path, tmp_path: Path, name: str, training: Training
) -> None:
    if training == Training():
        training = Training(initial=home / "begun")
    order = blend.Order(
        str(home / "parent"), tmp_path / "merged", (home / name,), Mixture((1.0,)), training
    )
    blend.run(order, Heard())
    first = quantize(
        tmp_path / "merged", tmp_path / "first", texts=home / "texts.jsonl", samples=8,
        group_size=32,
    )  # fmt: skip
    on_the_way = quantized(home, tmp_path / "one", name, training=training)
    one, two = on_the_way.tensors, first.tensors
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def test_an_artifact_says_how_its_adapter_was_trained(qlora: Made, undone: Made) -> None:
    assert qlora.manifest.training_base == "nf4" and undone.manifest.training_base == "stored"
    begun = undone.manifest.adapters[0].initial
    assert begun is not None and qlora.manifest.adapters[0].initial is None
    assert "in NF4, as QLoRA" in card.text(qlora.manifest, "mine")
    assert f"less what it started from, `{begun}`" in card.text(undone.manifest, "mine")


def compared(home: Path, made: Made, name: str, training: Training) -> float:
    order = compare.Order(
        str(home / "parent"), made.folder, (home / name,), training, text=home / "book.txt"
    )
    text = compare.run(recipe.draw({"windows": 4, "length": 48}), order, Told()).fidelity.text
    assert text is not None
    return text.mean_kl.value


def test_compare_holds_an_artifact_against_what_training_saw(
    home: Path, qlora: Made, undone: Made
) -> None:
    assert compared(home, qlora, "lora", Training()) < 0.05
    assert compared(home, undone, "shifted", Training(initial=home / "begun")) < 0.05
    with pytest.raises(QuantError, match="initial adapter, which is not there"):
        compared(home, undone, "shifted", Training())


def test_another_start_than_the_artifacts_is_refused(
    home: Path, undone: Made, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(home / "begun", tmp_path / "other"))
    tiny.edit_json(other / "adapter_config.json", base_model_name_or_path="renamed")
    with pytest.raises(CompareError, match="is not what lies beside it"):
        compared(home, undone, "shifted", Training(initial=other))


def test_a_qlora_is_swapped_or_merged_with_numbers(home: Path, qlora: Made) -> None:
    """Both are held against the base in NF4; the swapped one sits on another base than it saw."""
    quantize(home / "parent", home / "w4a16", texts=home / "texts.jsonl", samples=8, group_size=32)
    asked = compare.Order(
        str(home / "parent"), home / "w4a16", (home / "lora",), Training("nf4"),
        text=home / "book.txt",
    )  # fmt: skip
    draw = recipe.draw({"windows": 4, "length": 48})
    told = Told()
    beside, merged = ways.run(draw, ways.Order(asked, merged=qlora.folder), told)
    assert beside.text is not None and merged.text is not None
    assert merged.text.mean_kl.value < beside.text.mean_kl.value
    stored = compare.Order(*(str(home / "parent"), home / "w4a16", (home / "lora",)))
    with pytest.raises(CompareError, match="with --training-base nf4, here it is stored"):
        ways.run(draw, ways.Order(stored, merged=qlora.folder), told)


def test_another_way_of_training_is_another_command(home: Path) -> None:
    plan = recipe.build({})

    def facts(name: str, training: Training) -> command.Facts:
        opened = source.open(str(home / "parent"), adapters=[home / name], training=training)
        return command.facts(plan, opened, None, gated=False)

    plain, seen = facts("lora", Training()), facts("lora", Training("nf4"))
    assert command.difference(plain, seen) == "training base was stored, is nf4"
    undone = facts("shifted", Training(initial=home / "begun"))
    left = facts("shifted", Training("residual"))
    assert command.difference(left, undone) is not None
    assert undone["initial adapters"] != left["initial adapters"] == "none"


def test_a_compensated_export_takes_the_start_from_where_it_lies(
    home: Path, tmp_path: Path
) -> None:
    quantize(home / "parent", tmp_path / "w4", texts=home / "texts.jsonl", samples=8, group_size=32)
    rows = recipe.build({"samples": 8, "length": 32})
    more = Compensation(4, str(home / "parent"), rows, home / "texts.jsonl", home / "cache")
    place = export.Order(
        home / "shifted", tmp_path / "w4", tmp_path / "ready", initial=home / "begun",
        compensation=more,
    )  # fmt: skip
    assert export.run(place, Heard()).start == RANDOM


@pytest.mark.parametrize(
    ("adapters", "training", "told"),
    [
        (("lora", "shifted"), {"initial": "begun"}, "is the start of one adapter, and 2 are given"),
        (("lora",), {"initial": "begun"}, "started from nothing that would have to be undone"),
        (("shifted",), {"initial": "lora"}, "is not what"),
        (("shifted",), {"base": "residual", "initial": "begun"}, "give one of them"),
        (("lora", "lora"), {}, "is given twice"),
    ],
)
def test_what_cannot_have_been_is_refused_at_the_door(
    home: Path, adapters: tuple[str, ...], training: dict[str, Any], told: str
) -> None:
    given = {k: home / v if k == "initial" else v for k, v in training.items()}
    with pytest.raises(QuantError, match=told):
        Training(**given).adapters([home / name for name in adapters])


def test_the_start_is_told_by_what_it_holds(home: Path) -> None:
    [adapter] = Training(initial=home / "begun").adapters([home / "shifted"])
    [left] = Training("residual").adapters([home / "shifted"])
    assert starts.identity(adapter) is not None and starts.identity(left) is None


def test_the_commands_take_both(home: Path, tmp_path: Path) -> None:
    def ran(*words: object) -> Any:
        return CliRunner().invoke(app, [str(word) for word in words])

    fixed = ("quantize", home / "parent", "--out", tmp_path / "out", "--cache", home / "cache")
    sizes = ("--calibration", home / "texts.jsonl", "--samples", 4, "--length", 32, "--json")
    assert "give it with --adapter" in str(ran(*fixed, "--training-base", "nf4").exception)
    trained = ("--adapter", home / "shifted", "--initial", home / "begun")
    done = ran(*fixed, *sizes, *trained)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["adapters"][0]["initial"]
    manifest = artifact.read(tmp_path / "out")
    assert manifest is not None and manifest.training_base == "stored"
    done = ran("adapter", "merge", home / "parent", *trained, "--out", tmp_path / "merged")
    assert done.exit_code == 0, done.output
    assert load_file(tmp_path / "merged" / "model.safetensors")


def test_a_start_is_read_once_however_many_modules_it_began(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def counted(folder: Path) -> lora.Adapter:
        read.append(folder)
        return lora.read_trained(folder)

    monkeypatch.setattr(starts, "read_trained", counted)
    begun = shutil.copytree(home / "begun", tmp_path / "begun")
    (adapter,) = Training(initial=begun).adapters((home / "shifted",))
    assert len(adapter.pairs) > 1
    first = {module: starts.factors(adapter, module, None) for module in adapter.pairs}
    assert starts.identity(adapter) == lora.read_trained(begun).digest
    assert read == [begun.resolve()]
    weights = load_file(begun / lora.WEIGHTS)  # another start in its place is another
    save_file({name: 2 * tensor for name, tensor in weights.items()}, begun / lora.WEIGHTS)
    module = min(adapter.pairs)
    assert torch.equal(starts.factors(adapter, module, None)[0], 2 * first[module][0])
    assert starts.identity(adapter) == lora.read_trained(begun).digest
