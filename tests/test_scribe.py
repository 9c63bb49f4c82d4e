"""The model's own text: what it would say to our prompts, the same for the same seed, kept."""

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
from transformers import AutoModelForCausalLM

from quant import scribe, tokens
from quant.artifact import SINGLE
from quant.errors import CalibrationError, SourceError
from quant.intake import source
from quant.intake.source import Source
from quant.recipe import Recipe
from tests import tiny

RECIPE = Recipe(samples=3, length=24)
END = 3  # the end-of-turn token of the tiny models


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "model"
    return tiny.model_folder(folder, layers=1, dtype=torch.float32)


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Steps this small spend their time on waiting for a second thread, if another job has it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write(
    opened: Source | Path, cache: Path, recipe: Recipe = RECIPE, said: list[str] | None = None
) -> Tensor:
    if isinstance(opened, Path):
        opened = source.open(str(opened), cache=cache)
    tokenizer = tokens.load_tokenizer(opened.folder)
    return scribe.rows(opened, tokenizer, recipe, (said if said is not None else []).append)


def kept(cache: Path) -> list[Path]:
    return sorted((cache / "calibration").iterdir())


def prompts(model: Path) -> list[list[int]]:
    """Every prompt that we ship, as the tokens of a chat that waits for its answer."""
    tokenizer = tokens.load_tokenizer(model)
    texts = [json.loads(line)["text"] for line in scribe.PROMPTS.read_text("utf-8").splitlines()]
    chats = ([{"role": "user", "content": text}] for text in texts)
    return [tokens.of_chat(chat, tokenizer, asks=True) for chat in chats]


def test_the_same_seed_writes_the_same_text(made: Path, tmp_path: Path) -> None:
    first, again = write(made, tmp_path / "a"), write(made, tmp_path / "b")
    other = write(made, tmp_path / "a", RECIPE.model_copy(update={"seed": 1}))
    assert first.shape == (3, 24) and first.dtype == torch.int64
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_what_was_written_is_not_written_again(model: Path, tmp_path: Path) -> None:
    opened = source.open(str(model), cache=tmp_path / "cache")
    first = write(opened, tmp_path / "cache")
    (model / SINGLE).unlink()
    said: list[str] = []
    assert torch.equal(write(opened, tmp_path / "cache", said=said), first)
    assert said == [], "the cache needs no model"


def test_the_scheme_does_not_change_the_text(made: Path, tmp_path: Path) -> None:
    for scheme in ("w4a16", "w8a8"):
        write(made, tmp_path, RECIPE.model_copy(update={"scheme": scheme}))
    assert len(kept(tmp_path)) == 1


@pytest.mark.parametrize(
    "damage",
    [b"", b"no tensors", None, b"\x02\0\0\0\0\0\0\0{}"],
    ids=["empty", "text", "cut", "other"],
)
def test_a_damaged_cache_is_written_again(made: Path, tmp_path: Path, damage: bytes | None) -> None:
    first = write(made, tmp_path)
    [path] = kept(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] if damage is None else damage)
    said: list[str] = []
    assert torch.equal(write(made, tmp_path, said=said), first)
    assert said[0] == f"{path} is damaged; writing it again"
    assert path.read_bytes() == whole and kept(tmp_path) == [path]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", {"rms_norm_eps": 0.1}),
        ("generation_config.json", {"eos_token_id": [3, 9]}),
        ("tokenizer_config.json", {"eos_token": "</s>"}),
    ],
)
def test_what_decides_the_text_decides_where_it_is_kept(
    model: Path, tmp_path: Path, name: str, change: dict[str, Any]
) -> None:
    write(model, tmp_path)
    tiny.edit_json(model / name, **change)
    write(model, tmp_path)
    assert len(kept(tmp_path)) == 2


def test_sizes_and_weights_decide_where_it_is_kept(model: Path, tmp_path: Path) -> None:
    write(model, tmp_path)
    write(model, tmp_path, Recipe(samples=2, length=24))
    write(model, tmp_path, Recipe(samples=3, length=16))
    save_file({name: t * 1.1 for name, t in load_file(model / SINGLE).items()}, model / SINGLE)
    write(model, tmp_path)
    assert len(kept(tmp_path)) == 4


def test_every_row_begins_with_a_prompt_of_its_own(made: Path, tmp_path: Path) -> None:
    rows = write(made, tmp_path).tolist()
    tokenizer = tokens.load_tokenizer(made)
    starts = [prompt[:24] for prompt in prompts(made)]
    assert all(row in starts for row in rows)
    assert len({tuple(row) for row in rows}) == 3
    assert tokenizer.decode(rows[0]).startswith("<s><|im_start|>user\n")


def test_an_answer_that_ends_makes_room_for_the_next_prompt(model: Path, tmp_path: Path) -> None:
    """Here every token ends an answer: rows are prompts with one token between them."""
    tiny.edit_json(model / "generation_config.json", eos_token_id=list(range(tiny.VOCAB)))
    known = prompts(model)
    for row in write(model, tmp_path, Recipe(samples=3, length=300)).tolist():
        rest, seen = row, 0
        while rest:
            matching = [p for p in known if rest[: len(p)] == p[: len(rest)]]
            assert matching, "what follows an answer is no prompt"
            rest = rest[len(matching[0]) + 1 :]
            seen += 1
        assert seen > 1


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_every_written_token_is_likely_to_the_model(tmp_path: Path, family: str) -> None:
    """Against one pass without a cache: a token from a wrong position would not be."""
    made = tiny.model_folder(tmp_path / "model", family, dtype=torch.float32)
    ids = write(made, tmp_path, Recipe(samples=4, length=160))
    logits = AutoModelForCausalLM.from_pretrained(made)(input_ids=ids).logits
    known, ranks = prompts(made), list[int]()
    for row, scores in zip(ids.tolist(), logits, strict=True):
        [start] = [len(prompt) for prompt in known if row[: len(prompt)] == prompt] or [160]
        end = row.index(END, start) if END in row[start:] else 160
        likely = scores.topk(42).indices.tolist()  # 40, and room for ties in float32
        assert all(row[place] in likely[place - 1] for place in range(start, end))
        ranks += [likely[place - 1].index(row[place]) for place in range(start, end)]
    assert len(ranks) > 60
    assert sum(ranks) / len(ranks) < 18.5, "the likeliest are not drawn more often than the others"


def test_a_merged_adapter_writes_as_the_merged_model_does(made: Path, tmp_path: Path) -> None:
    recipe = Recipe(samples=2, length=160)
    adapter = tiny.adapter_folder(tmp_path / "lora", made, lora_alpha=64)
    opened = source.open(str(made), adapters=[adapter], cache=tmp_path)
    merged = tiny.model_folder(tmp_path / "merged", layers=1, dtype=torch.float32)
    save_file(
        {name: opened.tensors.get(name) for name in opened.tensors.names()},
        merged / SINGLE,
        metadata={"format": "pt"},
    )
    ours = write(opened, tmp_path, recipe)
    assert torch.equal(ours, write(merged, tmp_path, recipe))
    assert not torch.equal(ours, write(made, tmp_path, recipe))
    assert len(kept(tmp_path)) == 3


def test_more_rows_than_decode_at_once_are_all_written(made: Path, tmp_path: Path) -> None:
    rows = write(made, tmp_path, Recipe(samples=130, length=8))
    starts = {tuple(prompt[:8]) for prompt in prompts(made)}
    assert rows.shape == (130, 8)
    assert {tuple(row) for row in rows.tolist()} <= starts


def test_progress_is_told_and_no_bar_is_drawn(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    said: list[str] = []
    write(made, tmp_path, Recipe(samples=2, length=130), said)
    assert said == [
        "the model writes 2 x 130 tokens of calibration text",
        "calibration text: 49% of 2 x 130 tokens",
        "calibration text: 98% of 2 x 130 tokens",
    ]
    assert capfd.readouterr() == ("", "")


def test_a_cache_that_cannot_be_written_costs_no_text(made: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    said: list[str] = []
    ids = write(made, tmp_path / "cache", said=said)
    assert torch.equal(ids, write(made, tmp_path / "good"))
    assert said[-1].startswith(f"{tmp_path}/cache/calibration cannot be written (")


def test_a_template_that_refuses_a_question_is_told(model: Path, tmp_path: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ raise_exception('a system turn is needed') }}")
    with pytest.raises(CalibrationError, match=r"a system turn .* give a calibration file"):
        write(model, tmp_path)


def test_a_template_that_writes_nothing_is_told(model: Path, tmp_path: Path) -> None:
    (model / "chat_template.jinja").write_text("{# silence #}")
    with pytest.raises(CalibrationError, match=r"writes nothing for .* give a calibration file"):
        write(model, tmp_path)


def test_a_model_that_went_away_is_named(model: Path, tmp_path: Path) -> None:
    opened = source.open(str(model), cache=tmp_path)
    (model / SINGLE).unlink()
    with pytest.raises(SourceError, match=rf"^{model} cannot be loaded: "):
        write(opened, tmp_path)
