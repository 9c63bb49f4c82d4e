"""Merging into a folder: every variant computes what base and adapter do, unmerged, under PEFT."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quant import artifact
from quant.artifact import TrainingBase
from quant.errors import AdapterError, QuantError, RecipeError, TargetExists
from quant.intake import source
from quant.lora import adapter as lora
from quant.lora import blend, combine, export, merge, suitability
from quant.lora.adapter import LINEAGE, WEIGHTS
from quant.lora.blend import Blended, Order
from quant.lora.mixture import Mixture
from quant.lora.training import Training
from tests import adapter_rows, tiny, variants
from tests.adapter_rows import CASES, TABLE, Case
from tests.lora import write_lora
from tests.soft import trained_soft

# Float32 in another order of operations, through two layers.
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}


class Heard:
    """What a run said and how far it came."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[tuple[int, int]] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

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
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return variants.base_folder(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """The base of a case, made once for all that share it."""
    made: dict[tuple[str, bool], Path] = {}

    def find(case: Case) -> Path:
        kind = case.family, case.tied
        if kind not in made:
            made[kind] = adapter_rows.base_of(case, tmp_path_factory.mktemp(case.family))
        return made[kind]

    return find


def merged(base: Path, target: Path, *adapters: Path, **options: Any) -> Blended:
    mixture = options.pop("mixture", Mixture((1.0,) * len(adapters)))
    heard = options.pop("heard", Heard())
    return blend.run(Order(str(base), target, adapters, mixture, **options), heard)


def refused(base: Path, target: Path, *adapters: Path, **options: Any) -> str:
    """The line of a run that fails and leaves nothing."""
    with pytest.raises(QuantError) as caught:
        merged(base, target, *adapters, **options)
    assert not target.exists() and not list(target.parent.glob(".*"))
    return str(caught.value)


def assert_equal(base: Path, target: Path, folder: Path, theirs: Tensor, **options: Any) -> Blended:
    """The merged folder computes what was trained, and that is not what the base computes."""
    found = merged(base, target, folder, **options)
    torch.testing.assert_close(variants.loaded(target), theirs, **CLOSE)
    if theirs.shape == variants.loaded(base).shape:
        assert (theirs - variants.loaded(base)).abs().max() > 0.05
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_row_of_the_table_is_what_peft_computes(
    bases: Callable[[Case], Path], tmp_path: Path, name: str
) -> None:
    case = CASES[name]
    base = bases(case)
    folder, theirs = adapter_rows.trained(case, base, tmp_path / "lora")
    training = Training(case.training)
    assert_equal(base, tmp_path / "out", folder, theirs, training=training)
    found = suitability.judge(folder, base)
    assert found.merge.works, found.merge.reason
    told = found.swap.reason if found.swap.works else "no"
    assert told.replace("`quantserve adapter export`", "export").startswith(case.served), told
    cache = tmp_path / "cache"
    read = source.open(str(base), adapters=[folder], training=training, cache=cache).tensors
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(read.names()) == set(written)
    for tensor in written:
        torch.testing.assert_close(read.get(tensor), written[tensor], rtol=0, atol=0)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.served == "after export"])
def test_what_is_exported_is_what_peft_computes_too(
    bases: Callable[[Case], Path], tmp_path: Path, name: str
) -> None:
    """By names that the base has, at which a server takes it."""
    case = CASES[name]
    base = bases(case)
    folder, theirs = adapter_rows.trained(case, base, tmp_path / "lora")
    with pytest.raises(AdapterError):
        lora.validate(
            lora.read(folder),
            artifact.linear_shapes(base),
            max_rank=None,
            base_weights_fingerprint=None,
        )
    export.run(export.Order(folder, base, tmp_path / "ready", torch.float32), Heard())
    ready = lora.read(tmp_path / "ready")
    assert ready.pairs.keys() <= artifact.linear_shapes(base).keys()
    merged(base, tmp_path / "out", ready.folder)
    torch.testing.assert_close(variants.loaded(tmp_path / "out"), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("PROMPT_TUNING", "prompt tuning"),
        ("P_TUNING", "p-tuning"),
        ("PREFIX_TUNING", "prefix tuning"),
    ],
)
def test_the_rows_without_cases_are_no_loras(
    base: Path, tmp_path: Path, kind: str, name: str
) -> None:
    (row,) = (row for row in TABLE if not row.cases and name in row.variant.split(", "))
    folder = trained_soft(tmp_path / "soft", base, kind, tokens=3)
    assert f"peft_type '{kind}'" in refused(base, tmp_path / "out", folder)
    if row.served == "yes":
        found = suitability.judge(folder, base)
        assert (found.merge.works, found.swap.works) == (False, True)
    else:
        with pytest.raises(AdapterError, match="no door"):
            suitability.judge(folder, base)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("embedding", True),
        ("head", True),
        ("saved-embedding", True),
        ("saved-both", True),
        ("tokens", False),
        ("attention", False),
    ],
)
def test_a_tied_head_parts_when_only_one_side_was_trained(
    tied: Path, tmp_path: Path, name: str, *, parts: bool
) -> None:
    known = {
        **variants.PLAIN,
        **variants.BEYOND,
        "saved-embedding": {"modules_to_save": ["embed_tokens"]},
        "saved-both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    }
    folder, theirs = variants.trained(tmp_path / "lora", tied, **known[name])
    found = assert_equal(tied, tmp_path / "out", folder, theirs)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found.untied == parts and config["tie_word_embeddings"] != parts
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) == parts


@pytest.mark.parametrize("saved", [None, ["lm_head", "embed_tokens"]])
def test_a_grown_vocabulary_is_written_with_its_tokenizer(
    base: Path, tmp_path: Path, saved: list[str] | None
) -> None:
    folder, theirs = variants.trained(
        tmp_path / "lora", base, vocabulary=330, modules_to_save=saved
    )
    tiny.tokenizer(folder, chat=False)
    found = assert_equal(base, tmp_path / "out", folder, theirs)
    assert found.vocabulary == theirs.shape[-1] == 330
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_one_adapters_voice_becomes_the_models(base: Path, tmp_path: Path) -> None:
    folders: list[Path] = []
    for name in ("one", "two"):
        folder = tiny.adapter_folder(tmp_path / name, base, seed=len(folders))
        theirs = tiny.tokenizer(folder)
        theirs.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
        theirs.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(f"{{{{ messages }}}} {name}")
        folders.append(folder)
    merged(base, tmp_path / "merged", folders[0])
    assert (tmp_path / "merged" / "chat_template.jinja").read_text().endswith("one")
    assert "<|tool|>" not in (tmp_path / "merged" / "tokenizer.json").read_text(), "no row for it"
    tiny.edit_json(folders[1] / "adapter_config.json", revision="x")
    merged(base, tmp_path / "both", *folders)
    kept = tmp_path / "both" / "chat_template.jinja"
    assert not kept.exists() or not kept.read_text().endswith(("one", "two"))


def test_a_tied_vocabulary_grows_and_stays_tied(tied: Path, tmp_path: Path) -> None:
    folder, theirs = variants.trained(tmp_path / "lora", tied, vocabulary=330)
    heard = Heard()
    found = merged(tied, tmp_path / "out", folder, heard=heard)
    torch.testing.assert_close(variants.loaded(tmp_path / "out"), theirs, **CLOSE)
    assert (found.untied, found.vocabulary) == (False, 330)
    assert any("no adapter brings a tokenizer" in line for line in heard.lines)


def test_a_qlora_saw_a_base_that_its_rounding_moved(base: Path, tmp_path: Path) -> None:
    """Every linear layer of the blocks, adapted or not; twice rounded is another base again."""
    folder, _ = variants.trained(tmp_path / "lora", base, targets=("q_proj", "v_proj"))
    kinds: tuple[TrainingBase, ...] = ("stored", "nf4", "nf4-double")
    found = {}
    for seen in kinds:
        merged(base, tmp_path / seen, folder, training=Training(seen))
        found[seen] = variants.loaded(tmp_path / seen)
    assert (found["nf4"] - found["stored"]).abs().max() > 0.01
    assert not torch.equal(found["nf4"], found["nf4-double"])


@pytest.mark.parametrize("start", ["loftq", "corda", "pissa_niter_4"])
def test_a_shifted_start_is_refused_unless_its_base_is_given(
    base: Path, tmp_path: Path, start: str
) -> None:
    folder = tiny.adapter_folder(tmp_path / "lora", base)
    tiny.edit_json(folder / "adapter_config.json", init_lora_weights=start)
    assert "--training-base residual" in refused(base, tmp_path / "out", folder)


def test_the_base_keeps_its_dtype_and_another_can_be_asked_for(tmp_path: Path) -> None:
    base = tiny.model_folder(tmp_path / "base", layers=1)
    folder, theirs = variants.trained(tmp_path / "lora", base)
    merged(base, tmp_path / "same", folder)
    written = load_file(tmp_path / "same" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    merged(base, tmp_path / "full", folder, dtype=torch.float32)
    torch.testing.assert_close(variants.loaded(tmp_path / "full"), theirs, **CLOSE)
    config = json.loads((tmp_path / "full" / "config.json").read_text())
    assert config["dtype"] == "float32" and "torch_dtype" not in config


def two(base: Path, folder: Path, **settings: Any) -> tuple[Path, Path]:
    first, _ = variants.trained(folder / "first", base, use_rslora=True, r=9, **settings)
    second, _ = variants.trained(folder / "second", base, targets=("q_proj", "up_proj"), seed=1)
    return first, second


@pytest.mark.parametrize("method", ["linear", "cat"])
def test_weighted_adapters_are_pefts_concatenation(base: Path, tmp_path: Path, method: Any) -> None:
    first, _ = variants.trained(tmp_path / "first", base, alpha_pattern={"q_proj": 3})
    second, _ = variants.trained(tmp_path / "second", base, r=6, seed=1)
    weights = (0.5, 2.0)
    merged(base, tmp_path / "out", first, second, mixture=Mixture(weights, method))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, first, adapter_name="first")
    model.load_adapter(second, "second")
    model.add_weighted_adapter(["first", "second"], list(weights), "both", combination_type="cat")
    model.set_adapter("both")
    torch.testing.assert_close(variants.loaded(tmp_path / "out"), variants.logits(model), **CLOSE)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["pairs", "dora"])
def test_ties_trims_over_all_tensors_of_an_adapter(
    base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    folders = two(base, tmp_path, **settings)
    heard = Heard()
    mixture = Mixture((1.0, 0.5), "ties", 0.3)
    merged(base, tmp_path / "out", *folders, mixture=mixture, heard=heard)
    before = load_file(base / "model.safetensors")
    adapters = [lora.read_trained(folder) for folder in folders]
    vectors = [
        {name: merge.change(a, before[name], name) for name in a.parts.tensors()} for a in adapters
    ]
    cutoffs = [
        torch.cat([change.flatten() for change in vector.values()]).abs().sort().values
        for vector in vectors
    ]
    least = [float(values[-round(len(values) * 0.3)]) for values in cutoffs]
    for name, after in load_file(tmp_path / "out" / "model.safetensors").items():
        moving = [place for place, vector in enumerate(vectors) if name in vector]
        expected = before[name]
        if moving:
            expected = before[name] + combine.ties(
                [vectors[place][name] for place in moving],
                [mixture.weights[place] for place in moving],
                [least[place] for place in moving],
            )
        torch.testing.assert_close(after, expected)
    assert heard.steps == [(place, len(heard.steps)) for place in range(1, len(heard.steps) + 1)]


def test_dare_is_the_same_for_the_same_seed_and_keeps_its_density(
    base: Path, tmp_path: Path
) -> None:
    folders = two(base, tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    before = load_file(base / "model.safetensors")[name]
    found = []
    for place, seed in enumerate((3, 3, 4)):
        mixture = Mixture((1.0, 1.0), "dare", 0.25, seed)
        merged(base, tmp_path / f"out{place}", *folders, mixture=mixture)
        found.append(load_file(tmp_path / f"out{place}" / "model.safetensors")[name])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    moved = found[0] != before
    assert moved.float().mean() == pytest.approx(0.25, abs=0.02)
    whole = merge.change(lora.read(folders[1]), before, name)
    torch.testing.assert_close((found[0] - before)[moved], 4 * whole[moved], rtol=1e-4, atol=1e-6)


def test_a_mistake_is_a_line_and_leaves_nothing(base: Path, tied: Path, tmp_path: Path) -> None:
    good, _ = variants.trained(tmp_path / "good", base)
    dora, _ = variants.trained(tmp_path / "dora", base, use_dora=True)
    grown, _ = variants.trained(tmp_path / "grown", base, vocabulary=330)
    wide = write_lora(tmp_path / "wide", {"model.layers.0.mlp.up_proj": (64, 128)})
    bias, _ = variants.trained(tmp_path / "bias", base)
    tensors = load_file(bias / WEIGHTS)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias"
    save_file(tensors | {key: torch.ones(64)}, bias / WEIGHTS)
    out = tmp_path / "sub" / "out"
    out.parent.mkdir()
    assert "is given twice" in refused(base, out, good, good)
    assert "--method linear gives the same sum" in refused(
        base, out, good, dora, mixture=Mixture((1.0, 1.0), "cat")
    )
    assert "its weight can only be 1" in refused(base, out, grown, mixture=Mixture((0.5,)))
    assert "expected 128x64" in refused(base, out, wide)
    assert "no such tensor in the base" in refused(base, out, bias)
    assert "does not exist" in refused(base, out, tmp_path / "gone")
    assert "at least one is needed" in refused(base, out)
    assert "is not finite in float16" in refused(
        base, out, good, mixture=Mixture((9e5,)), dtype=torch.float16
    )
    (good / LINEAGE).write_text(json.dumps({"format": 1, "base": {"weights": "f" * 64}}))
    assert "base weights" in refused(base, out, good)


def test_two_adapters_of_one_head_merge_unless_one_resizes_it(base: Path, tmp_path: Path) -> None:
    head, _ = variants.trained(tmp_path / "head", base, targets=("lm_head", "q_proj"))
    grown, _ = variants.trained(tmp_path / "grown", base, vocabulary=330)
    saved, _ = variants.trained(tmp_path / "saved", base, modules_to_save=["lm_head"])
    merged(base, tmp_path / "out", head, saved)
    before = load_file(base / "model.safetensors")["lm_head.weight"]
    changes = [merge.change(lora.read_trained(f), before, "lm_head.weight") for f in (head, saved)]
    after = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"]
    torch.testing.assert_close(after, before + changes[0] + changes[1], rtol=1e-5, atol=1e-6)
    with pytest.raises(AdapterError, match="merges alone"):
        merged(base, tmp_path / "no", head, grown)


def test_a_target_that_exists_is_kept(base: Path, tmp_path: Path) -> None:
    folder, _ = variants.trained(tmp_path / "lora", base)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(TargetExists):
        merged(base, tmp_path / "out", folder)
    assert os.listdir(tmp_path / "out") == ["mine"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "ties", "density": 0.0},
        {"method": "dare", "density": 1.5},
        {"method": "linear", "density": 0.5},
        {"method": "svd"},
    ],
)
def test_a_mixture_that_means_nothing_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="--"):
        Mixture((1.0,), **wrong)
