"""Exported adapters: equal to the original to rounding, plain, bound to their base, served."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant import artifact
from quant.errors import AdapterError, QuantError, SourceError, TargetExists
from quant.lora import adapter as lora
from quant.lora import export, merge
from quant.lora.adapter import CONFIG, LINEAGE, WEIGHTS
from quant.lora.export import Exported, Order
from serve.adapters.sources import Sources
from serve.adapters.store import Store, base_of
from serve.errors import AdapterRefused
from tests import tiny, variants
from tests.test_pipeline import Made, calibration_file, quantize

SERVED = {**variants.PLAIN, "pissa": {"init_lora_weights": "pissa"},
          "olora": {"init_lora_weights": "olora", "use_rslora": True}}  # fmt: skip


class Heard:
    """How far a run came."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []

    def say(self, line: str) -> None:
        assert line

    def measured(self, name: str, done: int, total: int) -> None:
        assert name
        self.steps.append((done, total))


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with variants.one_thread():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return variants.base_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def child(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A W4A16 artifact of the base."""
    folder = tmp_path_factory.mktemp("child")
    return quantize(base, folder / "w4a16", texts=calibration_file(folder), samples=4)


def exported(adapter: Path, base: Path, target: Path, **options: Any) -> Exported:
    return export.run(Order(adapter, base, target, **options), Heard())


def refused(adapter: Path, base: Path, target: Path, **options: Any) -> str:
    with pytest.raises(QuantError) as caught:
        exported(adapter, base, target, **options)
    assert not target.exists() and not list(target.parent.glob(f".{target.name}*"))
    return str(caught.value)


def changes(folder: Path) -> dict[str, Tensor]:
    adapter = lora.read(folder)
    return {module: merge.delta(adapter, module) for module in adapter.pairs}


@pytest.mark.parametrize("name", SERVED)
def test_an_exported_adapter_computes_what_the_original_does(
    base: Path, tmp_path: Path, name: str
) -> None:
    folder, theirs = variants.trained(tmp_path / "lora", base, **SERVED[name])
    found = exported(folder, base, tmp_path / "out", dtype=torch.float32)
    ours = variants.with_adapter(base, tmp_path / "out")
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == found.rank
    assert not {"rank_pattern", "alpha_pattern", "use_rslora"} & set(config)
    pairs = lora.read(tmp_path / "out").pairs
    assert {pair.rank for pair in pairs.values()} == {found.rank}
    assert found.modules == len(pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("start", [True, "pissa"])
def test_sixteen_bits_round_the_change_and_not_the_base(
    base: Path, tmp_path: Path, dtype: torch.dtype, start: Any
) -> None:
    """PiSSA's two products are as large as the weight; what is written is their difference."""
    folder, _ = variants.trained(tmp_path / "lora", base, init_lora_weights=start)
    found = exported(folder, base, tmp_path / "out", dtype=dtype)
    exact = exported(folder, base, tmp_path / "exact", dtype=torch.float32)
    assert found.dtype == str(dtype).removeprefix("torch.") and found.bytes * 2 == exact.bytes
    full = changes(tmp_path / "exact")
    for module, change in changes(tmp_path / "out").items():
        assert (change - full[module]).norm() < 0.01 * full[module].norm()


def test_a_start_is_undone_alike_from_the_base_and_from_the_initial_adapter(
    base: Path, child: Made, tmp_path: Path
) -> None:
    folder, _ = variants.trained(tmp_path / "lora", base, init_lora_weights="pissa")
    found = exported(folder, child.folder, tmp_path / "saved", dtype=torch.float32)
    assert (found.rank, found.start) == (8, "pissa")
    shutil.move(tmp_path / "pissa_init", tmp_path / "elsewhere")
    assert "the initial adapter, which is not there" in refused(
        folder, child.folder, tmp_path / "none"
    )
    exported(folder, base, tmp_path / "worked-out", dtype=torch.float32)
    named = {"dtype": torch.float32, "initial": tmp_path / "elsewhere"}
    exported(folder, child.folder, tmp_path / "named", **named)
    saved = changes(tmp_path / "saved")
    for other in ("worked-out", "named"):
        for module, change in changes(tmp_path / other).items():
            torch.testing.assert_close(change, saved[module], rtol=1e-4, atol=1e-5)


def test_an_adapter_of_the_parent_fits_its_child_and_is_served(
    base: Path, child: Made, tmp_path: Path
) -> None:
    folder, _ = variants.trained(tmp_path / "lora", base, rank_pattern={"v_proj": 7})
    found = exported(folder, child.folder, tmp_path / "out")
    assert (found.base, found.dtype) == (artifact.weights_fingerprint(base), "bfloat16")
    lineage = json.loads((tmp_path / "out" / LINEAGE).read_text())
    assert lineage["base"] == child.manifest.parent.model_dump()
    assert lineage["exported_from"]["digest"] == lora.read(folder).digest
    served = Store(tmp_path / "store", base_of(child.folder, 16), Sources())
    taken = served.take_in(str(tmp_path / "out"))
    assert taken.rank == found.rank == 7
    # Exporting once more changes nothing but its lineage.
    exported(tmp_path / "out", child.folder, tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()


def test_another_base_of_the_same_shape_is_refused(base: Path, child: Made, tmp_path: Path) -> None:
    folder, _ = variants.trained(tmp_path / "lora", base)
    other = variants.base_folder(tmp_path / "other", seed=1)
    exported(folder, other, tmp_path / "out")
    line = refused(tmp_path / "out", child.folder, tmp_path / "no")
    assert "does not fit the base: base weights" in line
    with pytest.raises(AdapterRefused, match="base weights"):
        Store(tmp_path / "store", base_of(child.folder, 16), Sources()).take_in(
            str(tmp_path / "out")
        )


@pytest.mark.parametrize("name", variants.BEYOND)
def test_what_cannot_be_served_says_that_merging_works(
    base: Path, tmp_path: Path, name: str
) -> None:
    folder, _ = variants.trained(tmp_path / "lora", base, **variants.BEYOND[name])
    assert "use `quantserve adapter merge`" in refused(folder, base, tmp_path / "out")


def test_pefts_copy_of_the_head_is_dropped_only_where_it_is_the_bases(
    base: Path, child: Made, tmp_path: Path
) -> None:
    folder, theirs = variants.trained(tmp_path / "lora", base, targets=("lm_head", "q_proj"))
    with pytest.raises(AdapterError, match="adapter export"):
        lora.read(folder)
    exported(folder, child.folder, tmp_path / "out", dtype=torch.float32)
    ours = variants.with_adapter(base, tmp_path / "out")
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    tensors = load_file(folder / WEIGHTS)
    tensors["base_model.model.lm_head.base_layer.weight"] += 0.1
    save_file(tensors, folder / WEIGHTS)
    assert "replaces lm_head.weight" in refused(folder, child.folder, tmp_path / "no")


def test_an_initial_adapter_of_something_else_is_refused(base: Path, tmp_path: Path) -> None:
    folder, _ = variants.trained(tmp_path / "lora", base, init_lora_weights="gaussian")
    tiny.edit_json(folder / CONFIG, init_lora_weights="corda")
    wide, _ = variants.trained(tmp_path / "wide", base, r=5)
    alpha, _ = variants.trained(tmp_path / "alpha", base, lora_alpha=9)
    assert "differs" in refused(folder, base, tmp_path / "out", initial=wide)
    assert "scales" in refused(folder, base, tmp_path / "out", initial=alpha)
    assert "does not exist" in refused(folder, base, tmp_path / "out", initial=tmp_path / "gone")


def test_a_base_that_names_no_parent_is_refused(base: Path, child: Made, tmp_path: Path) -> None:
    folder, _ = variants.trained(tmp_path / "lora", base)
    bare = Path(shutil.copytree(child.folder, tmp_path / "bare"))
    (bare / artifact.MANIFEST).unlink()
    assert "give the folder it was made from" in refused(folder, bare, tmp_path / "out")
    with pytest.raises(SourceError, match="holds no weights itself, but bare: give one of them"):
        exported(folder, tmp_path, tmp_path / "out")
    tiny.edit_json(folder / CONFIG, lora_alpha=1e9)
    overflow = refused(folder, base, tmp_path / "out", dtype=torch.float16)
    assert "--dtype bfloat16 holds it" in overflow
    with pytest.raises(TargetExists):
        exported(folder, base, base)


def test_what_the_adapter_speaks_with_goes_along(tmp_path: Path) -> None:
    base = variants.base_folder(tmp_path / "base", layers=1)
    tiny.tokenizer(base)
    folder = tiny.adapter_folder(tmp_path / "lora", base)
    tiny.tokenizer(folder)
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    done = export.run(Order(folder, base, tmp_path / "out"), Heard())
    assert "temperature 0.5" in done.travels
    assert lora.read(tmp_path / "out").voice == lora.read(folder).voice
    (folder / "added_tokens.json").write_text('{"<|ghost|>": 320}')
    with pytest.raises(AdapterError, match="ghost"):
        export.run(Order(folder, base, tmp_path / "again"), Heard())
    assert not (tmp_path / "again").exists()
