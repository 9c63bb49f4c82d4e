"""`quant.pipeline`: whole artifacts of every family, faithful, repeatable, all or nothing."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from quant import artifact, checkpoint, formats, pipeline, recipe, tokens
from quant.artifact import LayerReport, Manifest
from quant.errors import RecipeError, SpaceError, TargetExists
from quant.lora import adapter
from quant.pipeline import Order
from quant.proof import card
from quant.solver import aside, devices, grid, int8, preflight
from quant.solver.preflight import Places
from tests import tiny
from tests.test_checkpoint import no_file_larger_than
from tests.test_gptq import plainly_rounded

pytestmark = pytest.mark.arithmetic

INT8_FAMILIES = ("llama", "gemma3_text", "phi3")
CASES = [
    *((family, "w4a16") for family in tiny.FAMILIES),
    ("llama", "w8a16"),
    *((family, "w8a8") for family in INT8_FAMILIES),
]
LEVELS = {
    "w4a16": grid.full_range(4, torch.bfloat16),
    "w8a16": grid.full_range(8, torch.bfloat16),
    "w8a8": int8.CHANNEL,
}


class Told:
    """Keeps what it is told; raises `Crash` after `crash_after` layers, `before` not counted."""

    def __init__(self, crash_after: int | None = None, before: int = 0) -> None:
        self.lines: list[str] = []
        self.layers: list[str] = []
        self._crash_after, self._before = crash_after, before

    def say(self, line: str) -> None:
        self.lines.append(line)

    def foreseen(self, line: str, facts: Mapping[str, float]) -> None:
        self.lines.append(line)
        self.needs = facts

    def solved(self, report: LayerReport, done: int, total: int) -> None:
        self.layers.append(report.name)
        assert done == self._before + len(self.layers) <= total
        if done == self._crash_after:
            raise Crash


class Crash(Exception):
    pass


@dataclass(frozen=True)
class Made:
    parent: Path
    folder: Path
    manifest: Manifest
    told: Told

    @property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / "model.safetensors")


def letters(seed: int, lines: int = 40) -> list[str]:
    """Lines of random letters: text of one kind, never twice the same."""
    draw = random.Random(seed)
    return ["".join(draw.choices(" abcdefghijklmnopqrstuvwxyz.,()", k=120)) for _ in range(lines)]


def calibration_file(folder: Path) -> Path:
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in letters(seed=0)))
    return path


def quantize(parent: Path, target: Path, told: Told | None = None, **asked: Any) -> Made:
    """`asked`: fields of the recipe, or of the order."""
    if "texts" in asked:
        asked["calibration_file"] = asked.pop("texts")
    known = ("adapters", "training", "calibration_file", "force")
    of_order = {k: asked.pop(k) for k in known if k in asked}
    order = Order(str(parent), target, cache=target.parent / "cache", **of_order)
    told = told or Told()
    plan = recipe.build({"samples": 24, "length": 64, **asked})
    return Made(parent, target, pipeline.run(plan, order, told), told)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibration_file(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    family, scheme = request.param
    home = tmp_path_factory.mktemp(f"{family}-{scheme}")
    parent = tiny.model_folder(home / "parent", family)
    sizes: dict[str, Any] = {} if scheme == "w8a8" else {"group_size": 32}
    texts = calibration_file(home)
    return quantize(parent, home / "out", scheme=scheme, texts=texts, **sizes)


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    return tiny.model_folder(tmp_path / "parent")


@pytest.fixture
def nothing_left(tmp_path: Path, parent: Path) -> Iterator[None]:
    """Fails a test after which anything lies beside the parent that was not there before."""
    before = set(tmp_path.iterdir()) | {tmp_path / "cache"}
    yield
    assert set(tmp_path.iterdir()) <= before


def loaded(parent: Path, tensors: dict[str, Tensor]) -> PreTrainedModel:
    """The parent's architecture with these weights, in float32."""
    model = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}, "only a tied head may be left out"
    return model


def served(parent: Path, tensors: dict[str, Tensor], scheme: str) -> PreTrainedModel:
    """`loaded`, and with W8A8 its linear layers see their inputs as an int8 kernel does."""
    model = loaded(parent, tensors)
    for module in model.model.layers.modules() if scheme == "w8a8" else ():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args: (int8.as_served(args[0]),))
    return model


@torch.no_grad()
def logits(model: PreTrainedModel, parent: Path) -> Tensor:
    """On text of the calibration's kind that calibrated nothing."""
    lines = tokens.load_tokenizer(parent)(letters(seed=1, lines=8))["input_ids"]
    out: Tensor = model(torch.tensor([ids[:64] for ids in lines]), use_cache=False).logits
    return out


def shift(one: Tensor, reference: Tensor) -> float:
    return float((one - reference).square().sum() / reference.square().sum())


def test_answers_stay_close_to_the_parents_and_closer_than_roundings(made: Made) -> None:
    scheme = made.manifest.scheme
    weights = dict(checkpoint.dequantized(made.folder))
    reference = AutoModelForCausalLM.from_pretrained(made.parent, dtype=torch.float32).eval()
    rounded = dict(reference.state_dict())
    for layer in made.manifest.layers:
        name = f"{layer.name}.weight"
        rounded[name] = plainly_rounded(rounded[name], made.manifest.group_size, LEVELS[scheme])
    expected = logits(reference, made.parent)
    ours, theirs = (logits(served(made.parent, w, scheme), made.parent) for w in (weights, rounded))
    # The weights are noise, which has no redundancy to spare: a trained model shifts less.
    assert shift(ours, expected) < (0.2 if scheme == "w4a16" else 1e-3)
    assert shift(ours, expected) < 0.9 * shift(theirs, expected)


def test_everything_but_the_linear_layers_is_the_parents(made: Made) -> None:
    before, after = load_file(made.parent / "model.safetensors"), made.tensors
    solved = {f"{layer.name}.weight" for layer in made.manifest.layers}
    kept = set(before) - solved
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= kept
    changed = {name for name in kept if not torch.equal(after[name], before[name])}
    if made.manifest.scheme == "w8a8":  # scales of activations are folded into norms
        second = "pre_feedforward" if "gemma" in str(made.parent) else "post_attention"
        changed -= {
            f"model.layers.{place}.{norm}_layernorm.weight"
            for place in range(2)
            for norm in ("input", second)
        }
    assert not changed
    suffixes = {"qweight", "qzeros", "scales", "g_idx", "weight_scale", "weight"}
    added = set(after) - kept
    assert {name.rpartition(".")[0] + ".weight" for name in added} == solved
    assert {name.rpartition(".")[2] for name in added} <= suffixes


@pytest.mark.parametrize("family", INT8_FAMILIES)
def test_outliers_among_the_activations_do_no_harm(
    family: str, tmp_path: Path, texts: Path
) -> None:
    """W8A8 of the same model, a few of whose channels are 32 times as large between layers."""
    lost = []
    for outliers in (False, True):
        parent = tiny.model_folder(tmp_path / f"parent-{outliers}", family)
        if outliers:
            tiny.plant_outliers(parent)
        made = quantize(parent, tmp_path / f"out-{outliers}", scheme="w8a8", texts=texts)
        weights = dict(checkpoint.dequantized(made.folder))
        reference = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32).eval()
        expected = logits(reference, parent)
        lost.append(shift(logits(served(parent, weights, "w8a8"), parent), expected))
        rounded = dict(reference.state_dict())
        for layer in made.manifest.layers:
            name = f"{layer.name}.weight"
            rounded[name] = plainly_rounded(rounded[name], -1, int8.CHANNEL)
        lost.append(shift(logits(served(parent, rounded, "w8a8"), parent), expected))
    plain, plainly, ours, unsmoothed = lost
    assert unsmoothed > 10 * plainly, "the outliers are none"
    assert ours < 3 * plain and ours < 1e-3
    assert ours < 0.1 * unsmoothed


def test_the_manifest_states_the_facts(made: Made) -> None:
    manifest = made.manifest
    assert artifact.read(made.folder) == manifest
    assert manifest.parent.weights == artifact.weights_fingerprint(made.parent)
    assert manifest.source == str(made.parent) and manifest.adapters == ()
    config = json.loads((made.folder / "config.json").read_text())
    assert [manifest.architecture] == config["architectures"]
    assert config["dtype"] == "bfloat16"
    form = formats.of_scheme(manifest.scheme, manifest.group_size)
    plan = {layer.name: form for layer in manifest.layers}
    assert config["quantization_config"] == formats.section(manifest.scheme, plan)
    assert manifest.group_size == (-1 if manifest.scheme == "w8a8" else 32)
    assert manifest.bits == (4 if manifest.scheme == "w4a16" else 8)
    assert [layer.name for layer in manifest.layers] == made.told.layers
    assert {(layer.bits, layer.group) for layer in manifest.layers} == {(form.bits, form.group)}
    assert len(manifest.layers) == 2 * (4 if manifest.architecture == "Phi3ForCausalLM" else 7)
    assert all(0 < layer.loss <= layer.rounding_loss for layer in manifest.layers)
    assert manifest.bytes_after == sum(t.nbytes for t in made.tensors.values())
    assert manifest.bytes_before > manifest.bytes_after
    assert manifest.recipe["samples"] == 24 and manifest.calibration.origin == "file"


def test_every_file_is_sealed_and_verifies(made: Made) -> None:
    sealed = set(made.manifest.files)
    assert sealed == {path.name for path in made.folder.iterdir()} - {artifact.MANIFEST}
    artifact.verify(made.folder, made.manifest)


def test_tokenizer_template_and_generation_settings_travel(made: Made) -> None:
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
             "generation_config.json")  # fmt: skip
    for name in names:
        assert (made.folder / name).read_bytes() == (made.parent / name).read_bytes()


def same_files(one: Path, other: Path) -> bool:
    """Byte for byte, but for the manifest and its card, which hold times and paths."""
    left, right = ({p.name: p for p in f.iterdir()} for f in (one, other))
    for named in (artifact.MANIFEST, card.NAME):
        del left[named], right[named]
    same = [left[name].read_bytes() == right[name].read_bytes() for name in left]
    return set(left) == set(right) and all(same)


def test_the_same_seed_gives_the_same_bytes(parent: Path, tmp_path: Path, texts: Path) -> None:
    one, other, third = (
        quantize(parent, tmp_path / str(place), texts=texts, seed=seed)
        for place, seed in enumerate((3, 3, 4))
    )
    assert same_files(one.folder, other.folder)
    assert not same_files(one.folder, third.folder)


def test_without_a_file_the_model_writes_its_own_and_repeatably(
    parent: Path, tmp_path: Path
) -> None:
    one, other = (
        quantize(parent, tmp_path / place / "out", samples=4, length=24) for place in "ab"
    )
    assert one.manifest.calibration.origin == "self-generated"
    assert one.manifest.calibration.tokens == 4 * 24
    assert same_files(one.folder, other.folder)


def test_shards_give_what_one_file_gives(parent: Path, tmp_path: Path, texts: Path) -> None:
    sharded = tiny.model_folder(tmp_path / "sharded", shard="50KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    one, other = (
        quantize(folder, tmp_path / f"{folder.name}-out", texts=texts)
        for folder in (parent, sharded)
    )
    assert same_files(one.folder, other.folder)


@pytest.mark.parametrize("tied", [{"tied": True}, {"tied": False}], ids=["tied", "untied"])
def test_only_an_untied_head_is_written(tied: dict[str, Any], tmp_path: Path, texts: Path) -> None:
    parent = tiny.model_folder(tmp_path / "parent", **tied)
    out = quantize(parent, tmp_path / "out", texts=texts)
    assert ("lm_head.weight" in out.tensors) is not tied["tied"]
    head = loaded(parent, dict(checkpoint.dequantized(out.folder))).get_output_embeddings().weight
    expected = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32).lm_head.weight
    assert torch.equal(head, expected)


def test_a_tied_heads_copy_in_the_file_is_dropped(tmp_path: Path, texts: Path) -> None:
    parent = tiny.model_folder(tmp_path / "parent", tied=True)
    plain = quantize(parent, tmp_path / "plain", texts=texts)
    held = load_file(parent / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    save_file(held, parent / "model.safetensors", metadata={"format": "pt"})
    assert same_files(quantize(parent, tmp_path / "copied", texts=texts).folder, plain.folder)


def test_an_adapter_is_merged_as_peft_merges_it(parent: Path, tmp_path: Path, texts: Path) -> None:
    lora = tiny.adapter_folder(tmp_path / "lora", parent)
    base = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32)
    shutil.copytree(parent, tmp_path / "merged")
    merged = PeftModel.from_pretrained(base, lora).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    ours = quantize(parent, tmp_path / "ours", texts=texts, adapters=(lora,))
    theirs = quantize(tmp_path / "merged", tmp_path / "theirs", texts=texts)
    plain = quantize(parent, tmp_path / "plain", texts=texts)
    codes = [
        {name: layer.codes for name, layer in checkpoint.read_layers(made.folder)}
        for made in (ours, theirs, plain)
    ]
    # PEFT's merge may differ in last bits, which break ties anew.
    assert all(float((codes[1][n] == c).float().mean()) > 0.99 for n, c in codes[0].items())
    q_proj = "model.layers.0.self_attn.q_proj"
    assert float((codes[2][q_proj] == codes[0][q_proj]).float().mean()) < 0.9
    (told,) = ours.manifest.adapters
    assert (told.name, told.digest) == ("lora", adapter.read(lora).digest)
    assert (told.rank, told.modules) == (4, 6)
    assert ours.manifest.parent == plain.manifest.parent


@pytest.mark.parametrize(
    ("stored", "served"),
    [(torch.float32, "bfloat16"), (torch.float16, "float16"), (torch.bfloat16, "bfloat16")],
)
def test_an_artifact_is_served_in_sixteen_bits(
    stored: torch.dtype, served: str, tmp_path: Path, texts: Path
) -> None:
    parent = tiny.model_folder(tmp_path / "parent", dtype=stored)
    out = quantize(parent, tmp_path / "out", texts=texts)
    assert json.loads((out.folder / "config.json").read_text())["dtype"] == served
    kinds = {t.dtype for t in out.tensors.values() if t.is_floating_point()}
    assert kinds == {getattr(torch, served)}


@pytest.mark.parametrize(("asked", "chosen"), [({}, 64), ({"group_size": -1}, -1)])
def test_the_group_size_fits_every_layer(
    asked: dict[str, Any], chosen: int, parent: Path, tmp_path: Path, texts: Path
) -> None:
    out = quantize(parent, tmp_path / "out", texts=texts, **asked)
    assert out.manifest.group_size == chosen
    section = artifact.quantization_config(out.folder) or {}
    assert section["group_size"] == chosen
    groups = {layer.scale.shape[1] for _, layer in checkpoint.read_layers(out.folder)}
    assert groups == ({1, 2} if chosen == 64 else {1})


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("crash_after", [1, 7])
def test_a_crash_in_the_first_block_leaves_nothing(
    crash_after: int, parent: Path, tmp_path: Path, texts: Path
) -> None:
    with pytest.raises(Crash):
        quantize(parent, tmp_path / "out", Told(crash_after), texts=texts)


@pytest.mark.usefixtures("nothing_left")
def test_a_crash_behind_a_block_leaves_what_the_next_run_goes_on_from(
    parent: Path, tmp_path: Path, texts: Path
) -> None:
    whole = quantize(parent, tmp_path / "cache" / "whole", texts=texts)
    out = tmp_path / "cache" / "out"
    with pytest.raises(Crash) as crash:
        quantize(parent, out, Told(crash_after=10), texts=texts)
    promise = "continues at block 2 of 2 when run again; --fresh starts over"
    assert crash.value.__notes__[-1] == promise
    after = quantize(parent, out, Told(before=7), texts=texts)
    assert "going on behind block 1 of 2, which an earlier run finished" in after.told.lines
    assert same_files(after.folder, whole.folder) and len(after.told.layers) == 7
    assert after.manifest.layers == whole.manifest.layers


def test_an_existing_artifact_is_replaced_only_by_a_whole_one(
    parent: Path, tmp_path: Path, texts: Path
) -> None:
    first = quantize(parent, tmp_path / "out", texts=texts)
    weights = (first.folder / artifact.SINGLE).read_bytes()
    with pytest.raises(TargetExists, match="--force"):
        quantize(parent, tmp_path / "out", texts=texts, seed=1)
    with pytest.raises(Crash):
        quantize(parent, tmp_path / "out", Told(crash_after=9), texts=texts, force=True)
    assert artifact.read(tmp_path / "out") == first.manifest
    assert (tmp_path / "out" / artifact.SINGLE).read_bytes() == weights
    second = quantize(parent, tmp_path / "out", texts=texts, scheme="w8a16", force=True)
    assert artifact.read(tmp_path / "out") == second.manifest
    assert {path.name for path in tmp_path.iterdir()} == {"parent", "out"}


@pytest.mark.usefixtures("nothing_left")
def test_what_is_no_artifact_is_never_replaced(parent: Path, texts: Path) -> None:
    with pytest.raises(TargetExists, match="not an artifact"):
        quantize(parent, parent, texts=texts, force=True)
    assert AutoModelForCausalLM.from_pretrained(parent) is not None


@pytest.mark.usefixtures("nothing_left")
def test_a_disk_full_before_the_first_block_is_done_leaves_nothing(
    parent: Path, tmp_path: Path, texts: Path
) -> None:
    full = r"cannot hold .*: File too large"
    with no_file_larger_than(50_000), pytest.raises(SpaceError, match=full):
        quantize(parent, tmp_path / "out", texts=texts)


@pytest.mark.usefixtures("nothing_left")
def test_a_disk_full_at_the_end_is_gone_on_with(parent: Path, tmp_path: Path, texts: Path) -> None:
    (parent / "LICENSE").write_text("x" * 300_000)
    out = tmp_path / "cache" / "out"
    with no_file_larger_than(200_000), pytest.raises(SpaceError, match="cannot hold what") as full:
        quantize(parent, out, texts=texts, samples=4)
    assert full.value.__notes__ == [
        "continues behind the last block when run again; --fresh starts over"
    ]
    after = quantize(parent, out, Told(before=14), texts=texts, samples=4)
    assert not after.told.layers and (out / "LICENSE").stat().st_size == 300_000
    artifact.verify(out, after.manifest)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("device", "reason"), [("tpu9", "is not cpu, cuda"), ("meta", "cuda:N"), ("cuda:63", "CUDA")]
)
def test_a_device_that_is_not_there_is_refused(
    device: str, reason: str, parent: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=reason):
        quantize(parent, tmp_path / "out", device=device)


@pytest.mark.parametrize("family", ["llama", *tiny.MIXTURES])
def test_where_activations_wait_decides_nothing(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, texts = tiny.model_folder(tmp_path / "parent", family), calibration_file(tmp_path)
    asked: dict[str, Any] = {"texts": texts, "samples": 64, "length": 128}  # three streams
    in_memory = quantize(parent, tmp_path / "memory", **asked)
    expected = (in_memory.folder / "model.safetensors").read_bytes()
    monkeypatch.setattr(aside, "_LEAST", 0)
    for places in (Places(0, 0, 3), Places(0, 3, 0), Places(1, 1, 1)):
        monkeypatch.setattr(preflight, "places", lambda *_, these=places: these)
        out = tmp_path / "-".join(map(str, places))
        quantize(parent, out, **asked)
        assert (out / "model.safetensors").read_bytes() == expected, places


def test_several_devices_make_what_one_makes(tmp_path: Path) -> None:
    parent, texts = tiny.model_folder(tmp_path / "parent"), calibration_file(tmp_path)
    asked: dict[str, Any] = {"texts": texts, "samples": 64, "length": 128}  # three streams
    alone = quantize(parent, tmp_path / "alone", **asked)
    together = quantize(parent, tmp_path / "together", device="cpu,cpu", **asked)
    for name, tensor in alone.tensors.items():
        assert torch.equal(together.tensors[name], tensor), name


def test_rows_solved_in_more_orders_lose_less(tmp_path: Path) -> None:
    parent, texts = tiny.model_folder(tmp_path / "parent"), calibration_file(tmp_path)
    once = quantize(parent, tmp_path / "once", texts=texts)
    refined = quantize(parent, tmp_path / "refined", texts=texts, refine=6)
    assert refined.manifest.recipe["refine"] == 6
    first, more = (sum(each.loss for each in made.manifest.layers) for made in (once, refined))
    assert more < 0.97 * first
    again = quantize(parent, tmp_path / "again", texts=texts, refine=6)
    assert all(torch.equal(again.tensors[n], t) for n, t in refined.tensors.items())


def test_forwards_in_sixteen_bits_lose_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does, and a CPU that has instructions for it."""
    parent, texts = tiny.model_folder(tmp_path / "parent"), calibration_file(tmp_path)
    exact = quantize(parent, tmp_path / "exact", texts=texts, exact=True)
    monkeypatch.setattr(devices, "forward_dtype", lambda _device, **_: torch.bfloat16)
    coarse = quantize(parent, tmp_path / "coarse", texts=texts)
    assert any(not torch.equal(coarse.tensors[n], t) for n, t in exact.tensors.items())
    for ours, theirs in zip(coarse.manifest.layers, exact.manifest.layers, strict=True):
        assert ours.loss < 1.1 * theirs.loss + 1e-5
