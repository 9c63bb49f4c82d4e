"""`intake.trainer` and `intake.vocabulary`: a trainer's folder as SOURCE is the plain one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quant import artifact, pipeline
from quant.errors import SourceError, SpaceError
from quant.intake import source
from quant.intake.source import Source
from quant.pipeline import Order
from quant.recipe import Recipe
from tests import tiny, trainers
from tests.test_checkpoint import no_file_larger_than
from tests.test_fsdp import saved
from tests.test_pipeline import Told, calibration_file


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the trainer would have exported: the float32 weights."""
    return tiny.model_folder(tmp_path_factory.mktemp("plain") / "model", dtype=torch.float32)


def state() -> dict[str, torch.Tensor]:
    return dict(tiny.model().state_dict())


def zero3(folder: Path) -> None:
    trainers.zero(folder, tiny.model(), stage=3, world=2)


def zero2(folder: Path) -> None:
    trainers.zero(folder, tiny.model(), stage=2, world=3)


def fsdp(folder: Path) -> None:
    saved(folder / "pytorch_model_fsdp_0", {"model": state()})


def whole(folder: Path) -> None:
    torch.save(state(), folder / "pytorch_model.bin")


def dist(folder: Path) -> None:
    trainers.megatron_dist(folder / "iter_0000001", state(), tensor=2, pipeline=1)
    (folder / "latest_checkpointed_iteration.txt").write_text("1")


def ranks(folder: Path) -> None:
    trainers.megatron_ranks(folder, state(), tensor=2, pipeline=2)


LAYOUTS = [zero2, zero3, fsdp, whole, dist, ranks]


def opened(folder: Path, cache: Path, told: list[str] | None = None) -> Source:
    return source.open(str(folder), cache=cache, say=(told if told is not None else []).append)


def refused(folder: Path, cache: Path) -> str:
    with pytest.raises(SourceError) as caught:
        opened(folder, cache)
    assert not list(cache.glob("trainer/*")) and not list(cache.glob("trainer/.*"))
    return str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_trainers_folder_opens_as_the_plain_one(
    plain: Path, tmp_path: Path, layout: Callable[[Path], None]
) -> None:
    layout(trainers.companions(tmp_path / "run"))
    told: list[str] = []
    read, wanted = opened(tmp_path / "run", tmp_path / "cache", told), opened(plain, tmp_path)
    assert read.fingerprint == wanted.fingerprint
    assert (read.dtype, read.architecture) == (wanted.dtype, wanted.architecture)
    assert read.folder.parent == tmp_path / "cache" / "trainer"
    assert [line.split()[0] for line in told] == ["reading", "converting"]
    loaded = AutoModelForCausalLM.from_pretrained(read.folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state().items())


def test_it_is_converted_once_and_again_when_it_changes(tmp_path: Path) -> None:
    run, cache = trainers.companions(tmp_path / "run"), tmp_path / "cache"
    zero3(run)
    first = opened(run, cache).folder
    marks = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    told: list[str] = []
    assert opened(run, cache, told).folder == first
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == marks
    assert [line.split()[0] for line in told] == ["reading"]
    trainers.zero(run, tiny.model(seed=1), stage=3, world=2)
    second = opened(run, cache).folder
    assert second != first and sorted(cache.glob("trainer/*")) == sorted([first, second])


@pytest.mark.parametrize("where", ["..", "huggingface", "hf", "tokenizer", "../hf"])
def test_config_and_tokenizer_are_looked_for_around(tmp_path: Path, where: str) -> None:
    run = tmp_path / "out" / "run"
    run.mkdir(parents=True)
    zero2(run)
    trainers.companions(run / where)
    assert opened(run, tmp_path / "cache").tensors.names() == tuple(sorted(state()))


def test_what_is_missing_is_said_with_its_place(tmp_path: Path) -> None:
    run = trainers.companions(tmp_path / "out" / "run")
    zero2(run)
    for name in ("tokenizer.json", "config.json"):
        (run / name).unlink()
        told = refused(run, tmp_path / "cache")
        assert f"put {'tokenizer.json and' if name != 'config.json' else 'the model'}" in told
        assert str(run) in told


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.to(torch.int8), "is int8: not full-precision weights"),
        (lambda t: t / 0, "holds numbers that are not finite: take an earlier step"),
    ],
    ids=["integers", "infinite"],
)
def test_numbers_that_are_no_weights_are_refused(
    tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], told: str
) -> None:
    run, name = trainers.companions(tmp_path / "run"), "model.layers.1.mlp.up_proj.weight"
    tensors = state()
    torch.save(tensors | {name: change(tensors[name])}, run / "pytorch_model.bin")
    message = refused(run, tmp_path / "cache")
    assert f"{run / 'pytorch_model.bin'}: {name} {told}" in message


def test_a_hostile_file_is_refused_as_a_source(tmp_path: Path) -> None:
    run, ran = trainers.companions(tmp_path / "run"), tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return exec, (f"open({str(ran)!r}, 'w').close()",)

    torch.save(state() | {"evil": Evil()}, run / "pytorch_model.bin")
    assert "asks for builtins.exec" in refused(run, tmp_path / "cache")
    assert not ran.exists()


def test_safetensors_are_preferred(plain: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(plain, tmp_path / "run"))
    (run / "pytorch_model.bin").write_bytes(b"never read")
    zero2(run)
    assert opened(run, tmp_path / "cache").folder == run


def test_a_folder_of_nothing_known_is_refused_as_before(tmp_path: Path) -> None:
    run = trainers.companions(tmp_path / "run")
    assert "holds neither model.safetensors nor" in refused(run, tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    zero2(trainers.companions(tmp_path / "run"))
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(SourceError, match=r"cache/trainer cannot be written"):
        opened(tmp_path / "run", tmp_path / "cache")


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    zero2(trainers.companions(tmp_path / "run"))
    cache = tmp_path / "cache"
    with no_file_larger_than(100_000), pytest.raises(SpaceError, match="cannot hold"):
        opened(tmp_path / "run", cache)
    assert not list(cache.glob("trainer/*")) and not list(cache.glob("trainer/.*"))


def test_fields_of_another_kind_are_one_line(tmp_path: Path) -> None:
    run = trainers.companions(tmp_path / "run")
    path = trainers.zero(run, tiny.model(), stage=2, world=1) / "mp_rank_00_model_states.pt"
    content = torch.load(path, weights_only=False)
    for field in ("shared_params", "param_shapes", "module"):
        torch.save(content | {field: [7]}, path)
        told = refused(run, tmp_path / "cache")
        assert str(path.parent) in told and "\n" not in told


def test_quantizing_a_zero3_folder_is_quantizing_the_plain_one(plain: Path, tmp_path: Path) -> None:
    zero3(trainers.companions(tmp_path / "run"))
    recipe = Recipe(scheme="w4a16", group_size=32, samples=4, length=32)
    made = {}
    for name, spec in (("zero", tmp_path / "run"), ("plain", plain)):
        order = Order(
            str(spec),
            tmp_path / name,
            calibration_file=calibration_file(tmp_path),
            cache=tmp_path / "cache",
        )
        manifest = pipeline.run(recipe, order, Told())
        made[name] = (load_file(tmp_path / name / artifact.SINGLE), manifest)
    tensors, manifest = made["zero"]
    wanted, plainly = made["plain"]
    assert tensors.keys() == wanted.keys() and manifest.layers == plainly.layers
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors.items())
    assert (manifest.parent, manifest.source) == (plainly.parent, str(tmp_path / "run"))


def resized(folder: Path, rows: int, *, head: int | None = None) -> Path:
    """A plain folder whose embedding has `rows`, with config.json as it was before."""
    tiny.model_folder(folder)
    tensors = load_file(folder / artifact.SINGLE)
    for name, size in (("model.embed_tokens", rows), ("lm_head", rows if head is None else head)):
        old = tensors[f"{name}.weight"]
        new = torch.ones(size, old.shape[1], dtype=old.dtype)
        new[: min(size, len(old))] = old[:size]
        tensors[f"{name}.weight"] = new
    save_file(tensors, folder / artifact.SINGLE)
    return folder


@pytest.mark.parametrize("rows", [tiny.VOCAB + 8, tiny.VOCAB + 1])
def test_a_resized_vocabulary_is_taken(tmp_path: Path, rows: int) -> None:
    folder, told = resized(tmp_path / "model", rows), list[str]()
    read = opened(folder, tmp_path / "cache", told)
    assert told == [
        f"config.json says vocab_size {tiny.VOCAB}; the embedding has {rows} rows, which are taken"
    ]
    assert read.config.vocab_size == rows
    assert read.fingerprint.weights == artifact.weights_fingerprint(folder)
    model = AutoModelForCausalLM.from_pretrained(read.folder)
    assert model.get_input_embeddings().weight.shape[0] == rows
    assert opened(folder, tmp_path / "cache").folder == read.folder


def test_a_resized_checkpoint_of_a_trainer_is_taken(tmp_path: Path) -> None:
    run, tensors = trainers.companions(tmp_path / "run"), state()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.ones(5, 64)])
    torch.save(tensors, run / "pytorch_model.bin")
    read = opened(run, tmp_path / "cache")
    assert read.config.vocab_size == tiny.VOCAB + 5
    assert torch.equal(read.tensors.get("lm_head.weight"), tensors["lm_head.weight"])


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = resized(tmp_path / "model", 200)
    tokens = len(tiny.tokenizer(tmp_path / "other"))
    assert refused(folder, tmp_path / "cache") == (
        f"{folder}: the embedding has 200 rows, config.json says {tiny.VOCAB}, and the tokenizer"
        f" needs {tokens}: put the tokenizer that the model was trained with there"
    )


def test_a_head_of_other_rows_is_refused(tmp_path: Path) -> None:
    folder = resized(tmp_path / "model", 330, head=320)
    assert "the embedding has 330 rows, the output head 320" in refused(folder, tmp_path / "cache")


def test_a_resized_folder_quantizes(tmp_path: Path) -> None:
    order = Order(
        str(resized(tmp_path / "model", 328)),
        tmp_path / "out",
        calibration_file=calibration_file(tmp_path),
        cache=tmp_path / "cache",
    )
    pipeline.run(Recipe(scheme="w8a8", samples=2, length=16), order, Told())
    embedding = load_file(tmp_path / "out" / artifact.SINGLE)["model.embed_tokens.weight"]
    assert embedding.shape[0] == 328
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
