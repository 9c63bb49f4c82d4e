"""Adapters beside a smoothed W8A8 artifact: in its units, on disk and on the way to the engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant import artifact
from quant.artifact import Manifest
from quant.errors import AdapterError
from quant.intake import source
from quant.lora import adapter as lora
from quant.lora import blend, export, merge, mixture, suitability, units
from quant.lora.adapter import LINEAGE, UNITS, WEIGHTS
from quant.proof import replica
from serve.adapters.sources import Sources
from serve.adapters.store import Store, base_of, check
from serve.errors import AdapterRefused
from tests import tiny, variants
from tests.test_export import Heard
from tests.test_pipeline import calibration_file, letters, quantize

CPU = torch.device("cpu")
ROWS = torch.arange(4, 84)[None]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with variants.one_thread():
        yield


@dataclass(frozen=True)
class Home:
    """A parent with outliers, its W8A8 artifact, and an adapter of every linear layer."""

    parent: Path
    artifact: Path
    manifest: Manifest
    lora: Path

    def near(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> float:
        """Mean KL of (artifact + factors) from (parent + adapter), in nats."""
        opened = source.open(str(self.parent))
        served = replica.of_artifact(opened, self.artifact, self.manifest, CPU)
        replica.beside(served, factors)
        meant = replica.of_parent(source.open(str(self.parent), adapters=[self.lora]), CPU)
        with torch.no_grad():
            expected, found = (m(input_ids=ROWS).logits.log_softmax(-1) for m in (meant, served))
        return float((expected.exp() * (expected - found)).sum(-1).mean())


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "phi3"])
def home(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Home:
    folder = tmp_path_factory.mktemp(request.param)
    parent = tiny.model_folder(folder / "parent", request.param, dtype=torch.float32)
    tiny.plant_outliers(parent)
    trained, _ = variants.trained(folder / "lora", parent, targets="all-linear")
    made = quantize(parent, folder / "w8a8", scheme="w8a8", texts=calibration_file(folder))
    return Home(parent, made.folder, made.manifest, trained)


def factors(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    adapter = lora.read(folder)
    scaled = ((name, merge.pair(adapter, name)) for name in adapter.pairs)
    return {n: (a, adapter.pairs[n].scale * b) for n, (a, b) in scaled}


def exported(home: Home, target: Path, dtype: torch.dtype | None = None) -> Path:
    export.run(export.Order(home.lora, home.artifact, target, dtype), Heard())
    return target


def in_store(home: Home, folder: Path, root: Path) -> Path:
    return Store(root, base_of(home.artifact, 16), Sources()).take_in(str(folder)).folder


def test_an_adapter_is_right_only_in_the_units_of_the_artifact(home: Home, tmp_path: Path) -> None:
    """KL was measured as 0.0003 to 0.0007 of that in the parent's units."""
    unscaled = home.near(factors(home.lora))
    ready = exported(home, tmp_path / "ready")
    assert home.near(factors(ready)) < 0.01 * unscaled
    assert home.near(factors(in_store(home, home.lora, tmp_path / "store"))) < 0.01 * unscaled


def test_the_server_and_export_write_the_same_numbers(home: Home, tmp_path: Path) -> None:
    ready = factors(exported(home, tmp_path / "ready", dtype=torch.float32))
    for name, (a, b) in factors(in_store(home, home.lora, tmp_path / "store")).items():
        torch.testing.assert_close(b @ a, ready[name][1] @ ready[name][0])


def test_what_was_exported_is_not_scaled_twice(home: Home, tmp_path: Path) -> None:
    ready = exported(home, tmp_path / "ready")
    assert json.loads((ready / LINEAGE).read_text())["artifact"] == lora.identity(home.manifest)
    kept = in_store(home, ready, tmp_path / "store")
    assert (kept / WEIGHTS).read_bytes() == (ready / WEIGHTS).read_bytes()
    again = tmp_path / "again"
    export.run(export.Order(ready, home.artifact, again), Heard())
    assert (again / WEIGHTS).read_bytes() == (ready / WEIGHTS).read_bytes()


def test_what_was_exported_fits_that_artifact_alone(home: Home, tmp_path: Path) -> None:
    ready = exported(home, tmp_path / "ready")
    other = quantize(home.parent, tmp_path / "w4a16", texts=calibration_file(tmp_path), samples=4)
    for base, told in ((other.folder, "expected one exported for"), (home.parent, "the parent")):
        with pytest.raises(AdapterRefused, match=told) as refusal:
            Store(tmp_path / "no", base_of(base, 16), Sources()).take_in(str(ready))
        assert refusal.value.param == "artifact"
        with pytest.raises(AdapterError, match="exported for artifact"):
            export.run(export.Order(ready, base, tmp_path / "no-more"), Heard())
    with pytest.raises(AdapterError, match="a change of the parent"):
        source.open(str(home.parent), adapters=[ready])
    order = blend.Order(str(home.parent), tmp_path / "b", (ready,), mixture.Mixture((1.0,)))
    with pytest.raises(AdapterError, match="a change of the parent"):
        blend.run(order, Heard())


def test_the_divisors_undo_what_smoothing_did(home: Home) -> None:
    """Of a layer fed by a norm: the parent's norm over the artifact's."""
    found = units.read(home.artifact / UNITS).divisors
    first = [f"model.layers.0.self_attn.{kind}_proj.input_divisor" for kind in ("q", "qkv")]
    name = next(name for name in first if name in found)
    norm = "model.layers.0.input_layernorm.weight"
    was, now = (_norm(folder, norm) for folder in (home.parent, home.artifact))
    torch.testing.assert_close(found[name], was / now)
    assert found[name].max() > 4 * found[name].min()
    assert any(n.endswith(".output_divisor") for n in found)


def _norm(folder: Path, name: str) -> Tensor:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        stored: Tensor = file.get_tensor(name).float()
    return stored + ("gemma" in str(folder))


def test_an_artifact_that_does_not_tell_its_units_takes_no_adapter(
    home: Home, tmp_path: Path
) -> None:
    """As the first version wrote them."""
    old = Path(shutil.copytree(home.artifact, tmp_path / "old"))
    (old / UNITS).unlink()
    artifact.seal(old, home.manifest)
    with pytest.raises(AdapterError, match="quantize its parent again"):
        export.run(export.Order(home.lora, old, tmp_path / "no"), Heard())
    store = Store(tmp_path / "store", base_of(old, 16), Sources())
    with pytest.raises(AdapterRefused, match="quantize its parent again"):
        store.take_in(str(home.lora))
    assert not list(store.root.iterdir())
    with pytest.raises(AdapterRefused, match="quantize its parent again"):
        check(home.lora, store.base)  # what `quantserve serve --adapter` asks first
    verdict = suitability.judge(home.lora, old).swap
    assert not verdict.works and "quantize its parent again" in verdict.reason


def test_units_are_sealed_and_no_loader_takes_them_for_weights(home: Home) -> None:
    assert UNITS in home.manifest.files and not UNITS.endswith((".safetensors", ".bin", ".pt"))
    assert artifact.headers(home.artifact).keys() == _names(home.artifact)


def _names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def test_replicas_of_two_artifacts_may_share_a_store(home: Home, tmp_path: Path) -> None:
    texts = tmp_path / "other.jsonl"
    texts.write_text("".join(json.dumps({"text": line}) + "\n" for line in letters(seed=9)))
    other = quantize(home.parent, tmp_path / "other", scheme="w8a8", texts=texts, samples=4)
    here = in_store(home, home.lora, tmp_path / "store")
    there = Store(tmp_path / "store", base_of(other.folder, 16), Sources())
    beside = there.take_in(str(home.lora))
    assert beside.folder != here and beside.folder.parent == here.parent
    assert (here / WEIGHTS).read_bytes() != (beside.folder / WEIGHTS).read_bytes()
    shutil.rmtree(beside.folder)
    found = there.find(beside.digest)
    assert found == beside and (beside.folder / WEIGHTS).is_file()


def test_numbers_that_no_longer_fit_sixteen_bits_are_refused(home: Home, tmp_path: Path) -> None:
    wide = Path(shutil.copytree(home.lora, tmp_path / "wide"))
    tensors = {name: tensor.half() for name, tensor in load_file(wide / WEIGHTS).items()}
    for name in tensors:
        if "lora_A" in name:
            tensors[name] = torch.full_like(tensors[name], 6e4)
    save_file(tensors, wide / WEIGHTS)
    with pytest.raises(AdapterRefused, match=r"not finite in torch\.float16"):
        in_store(home, wide, tmp_path / "store")
    assert not list((tmp_path / "store").iterdir())
