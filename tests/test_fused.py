"""`intake.fused`: experts that files hold in one tensor, told as if they were one by one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quant import artifact
from quant.errors import AdapterError, SourceError
from quant.intake import source
from quant.intake.source import Source
from quant.lora import adapter as lora
from quant.lora import blend, export, footing, suitability
from quant.lora.mixture import Mixture
from quant.recipe import Recipe
from tests import tiny, trainers, variants
from tests.lora import held, write_lora
from tests.test_blend import Heard
from tests.test_fsdp import saved
from tests.test_scribe import write

FILE = "model.safetensors"


def resaved(plain: Path, folder: Path) -> Path:
    """The model in `plain` with the tensors that transformers 5 has in memory."""
    shutil.copytree(plain, folder)
    (folder / FILE).unlink()
    model = AutoModelForCausalLM.from_pretrained(plain)
    model.save_pretrained(folder, save_original_format=False)
    assert any(name.endswith("experts.down_proj") for name in load_file(folder / FILE))
    return folder


@pytest.fixture(scope="module", params=tiny.MIXTURES)
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp(request.param)
    return tiny.model_folder(home / "plain", request.param, dtype=torch.float32)


@pytest.fixture(scope="module")
def fused(plain: Path) -> Path:
    return resaved(plain, plain.parent / "fused")


def opened(folder: Path, *adapters: Path) -> Source:
    return source.open(str(folder), cache=folder.parent / "cache", adapters=adapters)


def experts(read: Source) -> list[str]:
    return [name for name in read.tensors.names() if ".experts." in name]


def same(read: Source, wanted: Source) -> bool:
    names = wanted.tensors.names()
    return read.tensors.names() == names and all(
        torch.equal(read.tensors.get(name), wanted.tensors.get(name)) for name in names
    )


def test_a_model_is_the_same_whichever_way_its_files_hold_the_experts(
    plain: Path, fused: Path
) -> None:
    read, wanted = opened(fused), opened(plain)
    assert same(read, wanted) and len(experts(read)) >= 18
    assert read.fingerprint == wanted.fingerprint and read.bytes == wanted.bytes
    assert footing.base_of(fused).parent == footing.base_of(plain).parent


def test_an_expert_is_read_without_the_others(fused: Path) -> None:
    """What else lies in the file is overwritten: nothing of it shows."""
    read = opened(fused)
    name = experts(read)[-1]
    wanted, header = read.tensors.get(name), read.tensors.headers[name]
    assert header.end - header.begin == wanted.nbytes
    path = fused / FILE
    whole = path.read_bytes()
    try:
        path.write_bytes(bytes(header.begin) + whole[header.begin : header.end])
        assert torch.equal(read.tensors.get(name), wanted)
    finally:
        path.write_bytes(whole)


def zero(folder: Path, state: dict[str, torch.Tensor], family: str) -> None:
    del state
    trainers.zero(folder, tiny.model(family), stage=3, world=2)


def fsdp(folder: Path, state: dict[str, torch.Tensor], family: str) -> None:
    del family
    saved(folder / "pytorch_model_fsdp_0", {"model": state})


@pytest.mark.parametrize("layout", [zero, fsdp])
def test_a_trainers_fused_experts_come_in(
    plain: Path, tmp_path: Path, layout: Callable[..., None]
) -> None:
    family = plain.parent.name.rstrip("0123456789")  # pytest numbers folders
    model, run = tiny.model(family), tmp_path / "run"
    shutil.copytree(plain, run, ignore=shutil.ignore_patterns(FILE))
    layout(run, dict(model.state_dict()), family)
    read, wanted = opened(run), opened(plain)
    assert same(read, wanted) and read.fingerprint == wanted.fingerprint


def test_a_trainers_experts_one_by_one_come_in_as_well(plain: Path, tmp_path: Path) -> None:
    """As transformers 4 had them in memory, and the hub has them."""
    run = tmp_path / "run"
    shutil.copytree(plain, run, ignore=shutil.ignore_patterns(FILE))
    saved(run / "pytorch_model_fsdp_0", {"model": load_file(plain / FILE)})
    assert same(opened(run), opened(plain))


def test_adapters_merge_into_both_alike(plain: Path, fused: Path, tmp_path: Path) -> None:
    """One on an expert and one on the attention of the same model."""
    shapes = artifact.linear_shapes(plain)
    expert = experts(opened(plain))[-1].removesuffix(".weight")
    attention = "model.layers.1.self_attn.q_proj"
    folder = write_lora(tmp_path / "lora", {name: shapes[name] for name in (expert, attention)})
    read, wanted = opened(fused, folder), opened(plain, folder)
    assert same(read, wanted)
    before = opened(plain)
    moved = {
        n for n in experts(read) if not torch.equal(read.tensors.get(n), before.tensors.get(n))
    }
    assert moved == {f"{expert}.weight"}


@pytest.mark.parametrize("start", ["gaussian", "pissa"])
def test_an_adapter_on_attention_is_exported_for_both_alike(
    plain: Path, fused: Path, tmp_path: Path, start: str
) -> None:
    query = "model.layers.1.self_attn.q_proj"
    folder = write_lora(tmp_path / "lora", {query: artifact.linear_shapes(plain)[query]})
    tiny.edit_json(folder / lora.CONFIG, init_lora_weights=start)
    found, wanted = suitability.judge(folder, fused), suitability.judge(folder, plain)
    assert found == wanted and found.merge.works and found.swap.works
    for base in (plain, fused):
        export.run(export.Order(folder, base, tmp_path / base.name), Heard())
    assert held(tmp_path / "fused") == held(tmp_path / "plain")


def test_an_adapter_on_one_expert_is_for_merging_into_both_alike(
    plain: Path, fused: Path, tmp_path: Path
) -> None:
    expert = experts(opened(plain))[-1].removesuffix(".weight")
    folder = write_lora(tmp_path / "lora", {expert: artifact.linear_shapes(plain)[expert]})
    found, wanted = suitability.judge(folder, fused), suitability.judge(folder, plain)
    assert found == wanted and found.merge.works and not found.swap.works
    for base in (plain, fused):
        with pytest.raises(AdapterError, match=expert):
            export.run(export.Order(folder, base, tmp_path / base.name), Heard())


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_adapters_on_experts_compute_what_they_do_under_peft(family: str, tmp_path: Path) -> None:
    """PEFT 0.21 takes such adapters for these families, where they are on every expert."""
    hub = variants.base_folder(tmp_path / "hub", family)
    base = resaved(hub, tmp_path / "base")
    shapes = artifact.linear_shapes(hub)
    adapted = {n: size for n, size in shapes.items() if ".experts." in n or n.endswith("q_proj")}
    folder = write_lora(tmp_path / "lora", adapted)
    theirs = variants.with_adapter(base, folder)
    assert (theirs - variants.loaded(base)).abs().max() > 1
    blend.run(blend.Order(str(base), tmp_path / "merged", (folder,), Mixture((1.0,))), Heard())
    torch.testing.assert_close(variants.loaded(tmp_path / "merged"), theirs, rtol=1e-4, atol=2e-5)


def test_a_mixture_with_an_adapter_on_an_expert_writes_as_the_merged_one(
    plain: Path, fused: Path, tmp_path: Path
) -> None:
    module = experts(opened(plain))[-1].removesuffix(".weight")
    shapes, recipe = artifact.linear_shapes(plain), Recipe(samples=2, length=160)
    read = opened(fused, write_lora(tmp_path / "lora", {module: shapes[module]}, strength=1))
    merged = shutil.copytree(plain, tmp_path / "merged")
    held = {name: read.tensors.get(name) for name in read.tensors.names()}
    save_file(held, merged / FILE, metadata={"format": "pt"})
    ours = write(read, tmp_path, recipe)
    assert torch.equal(ours, write(merged, tmp_path, recipe))
    assert not torch.equal(ours, write(plain, tmp_path, recipe))


def test_experts_of_another_size_than_config_json_says_are_refused(
    fused: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(fused, tmp_path / "odd")
    held = load_file(fused / FILE)
    name = next(name for name in held if name.endswith("down_proj"))
    save_file({**held, name: held[name][:2].contiguous()}, folder / FILE)
    with pytest.raises(SourceError, match=r"experts\.down_proj is \[2, .*config\.json says"):
        opened(folder)


def test_experts_that_are_there_in_both_ways_are_refused(
    plain: Path, fused: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(fused, tmp_path / "both")
    save_file(load_file(fused / FILE) | load_file(plain / FILE), folder / FILE)
    with pytest.raises(SourceError, match="leave one of them"):
        opened(folder)
