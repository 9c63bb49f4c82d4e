"""`adapter export --compensate`: nearer to the 16-bit pair, in the file of the adapter alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from quant import recipe
from quant.cli import app
from quant.errors import AdapterError, QuantError
from quant.lora import adapter as lora
from quant.lora import export
from quant.lora.adapter import CONFIG, LINEAGE, WEIGHTS
from quant.lora.compensate import Compensation
from quant.lora.export import Exported, Order
from quant.proof import compare, ways
from serve.adapters.sources import Sources
from serve.adapters.store import Store, base_of
from tests import tiny, variants
from tests.test_export import Heard
from tests.test_pipeline import calibration_file, letters, quantize
from tests.test_ways import Told

pytestmark = pytest.mark.arithmetic

ROWS = recipe.build({"samples": 48, "length": 64})
SCHEMES: dict[str, dict[str, Any]] = {
    "w4a16": {"group_size": 32},
    "w8a16": {"group_size": -1},
    "w8a8": {},
}


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with variants.one_thread():
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent with outliers, an artifact of each scheme, an adapter, a text of its domain."""
    folder = tmp_path_factory.mktemp("compensate")
    parent = tiny.model_folder(folder / "parent", dtype=torch.float32)
    tiny.plant_outliers(parent)
    texts = calibration_file(folder)
    for scheme, sizes in SCHEMES.items():
        quantize(parent, folder / scheme, scheme=scheme, texts=texts, samples=8, **sizes)
    variants.trained(folder / "lora", parent, targets=("q_proj", "v_proj", "down_proj"))
    (folder / "book.txt").write_text("\n".join(letters(seed=5)))
    return folder


def compensated(home: Path, scheme: str, target: Path, rank: int = 8, **more: Any) -> Exported:
    order = {"adapter": home / "lora", "parent": str(home / "parent"), **more}
    asked = Compensation(rank, order["parent"], ROWS, home / "texts.jsonl", home / "cache")
    place = Order(order["adapter"], home / scheme, target, compensation=asked)
    return export.run(place, Heard())


def distances(home: Path, scheme: str, ready: Path) -> tuple[float, float]:
    """Mean KL of the adapter as it is, and as exported, on text that calibrated nothing."""
    asked = compare.Order(
        str(home / "parent"), home / scheme, (home / "lora",), text=home / "book.txt"
    )
    draw = recipe.draw({"windows": 12, "length": 48})
    found = [way.text for way in ways.run(draw, ways.Order(asked, ready=(ready,)), Told())]
    assert found[0] is not None and found[1] is not None
    return found[0].mean_kl.value, found[1].mean_kl.value


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_is_nearer_to_parent_and_adapter_in_every_scheme(
    home: Path, tmp_path: Path, scheme: str
) -> None:
    done = compensated(home, scheme, tmp_path / "ready")
    plain, ready = distances(home, scheme, tmp_path / "ready")
    assert ready < 2 / 3 * plain
    assert done.rank == 12  # four of its own


def test_with_all_the_rank_there_is_nothing_is_left_of_rounded_weights(
    home: Path, tmp_path: Path
) -> None:
    compensated(home, "w4a16", tmp_path / "ready", rank=124)
    plain, ready = distances(home, "w4a16", tmp_path / "ready")
    assert ready < 0.01 * plain


def test_layers_that_the_adapter_left_alone_are_corrected_too(home: Path, tmp_path: Path) -> None:
    compensated(home, "w4a16", tmp_path / "ready")
    found = lora.read(tmp_path / "ready")
    kinds = {module.rpartition(".")[2] for module in found.pairs}
    assert {"o_proj", "up_proj", "gate_proj", "k_proj"} < kinds and len(found.pairs) == 14
    assert {pair.rank for pair in found.pairs.values()} == {12}
    assert json.loads((tmp_path / "ready" / CONFIG).read_text())["lora_alpha"] == 12


def test_it_is_served_beside_that_artifact_alone(home: Path, tmp_path: Path) -> None:
    compensated(home, "w4a16", tmp_path / "ready")
    bound = json.loads((tmp_path / "ready" / LINEAGE).read_text())["artifact"]
    store = Store(tmp_path / "store", base_of(home / "w4a16", 16), Sources())
    assert bound == store.base.artifact
    assert store.take_in(str(tmp_path / "ready")).rank == 12
    with pytest.raises(AdapterError, match="exported for artifact"):
        export.run(Order(tmp_path / "ready", home / "w8a16", tmp_path / "no"), Heard())


def test_the_same_command_makes_the_same_file(home: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        compensated(home, "w8a8", tmp_path / name)
    one, two = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("family", ["gemma3_text", "phi3"])
def test_other_families_fare_as_well(tmp_path: Path, family: str) -> None:
    parent = tiny.model_folder(tmp_path / "parent", family, dtype=torch.float32)
    tiny.plant_outliers(parent)
    texts = calibration_file(tmp_path)
    (tmp_path / "book.txt").write_text("\n".join(letters(seed=5)))
    quantize(parent, tmp_path / "w8a8", scheme="w8a8", texts=texts, samples=8)
    variants.trained(tmp_path / "lora", parent, targets="all-linear")
    compensated(tmp_path, "w8a8", tmp_path / "ready")
    plain, ready = distances(tmp_path, "w8a8", tmp_path / "ready")
    assert ready < plain


def test_what_cannot_be_compensated_is_refused(home: Path, tmp_path: Path) -> None:
    export.run(Order(home / "lora", home / "w8a8", tmp_path / "bound"), Heard())
    other = tiny.model_folder(tmp_path / "other", seed=1)
    for told, scheme, more in (
        ("is not quantized", "parent", {}),
        ("512, the most that vLLM serves", "w4a16", {"rank": 509}),
        ("at least 1", "w4a16", {"rank": 0}),
        ("is not what", "w4a16", {"parent": str(other)}),
        ("give the adapter that was trained", "w8a8", {"adapter": tmp_path / "bound"}),
    ):
        with pytest.raises(QuantError, match=told):
            compensated(home, scheme, tmp_path / "no", **more)
        assert not (tmp_path / "no").exists()


def test_the_command_says_how_to_serve_it(home: Path, tmp_path: Path) -> None:
    words = [
        "adapter",
        "export",
        home / "lora",
        "--base",
        home / "w4a16",
        "--out",
        tmp_path / "out",
    ]
    texts = ["--calibration", home / "texts.jsonl", "--samples", "8", "--length", "32"]
    more = ["--compensate", "20", "--parent", home / "parent", "--cache", home / "cache", *texts]
    ran = CliRunner().invoke(app, [str(word) for word in [*words, *more]])
    assert ran.exit_code == 0, ran.output
    assert "rank 24, 14 modules" in ran.stdout and "--max-lora-rank 32" in ran.stdout
    for bare, told in ((["--compensate", "8"], "needs --parent"), (texts, "is for --compensate")):
        ran = CliRunner().invoke(app, [str(word) for word in [*words, *bare]])
        assert told in str(ran.exception)
