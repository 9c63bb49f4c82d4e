"""Calibration rows: packed as they would be served, and every line that cannot be used is named."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors

from quant import calibration, tokens
from quant.artifact import CalibrationReport
from quant.calibration import Batches, pack
from quant.errors import CalibrationError, RecipeError
from quant.intake import source
from quant.recipe import Recipe
from tests import tiny
from tests.test_pipeline import letters, quantize

RECIPE = Recipe(samples=4, length=16)
TEXT = "the quick brown fox jumps over the lazy dog and runs through the forest"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("made") / "model", layers=1)


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "lines.jsonl"


def write(file: Path, *records: Any) -> None:
    file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))


def prepare(
    model: Path, file: Path | None, recipe: Recipe = RECIPE, said: list[str] | None = None
) -> Batches:
    opened = source.open(str(model), cache=model.parent / "cache")
    return calibration.prepare(opened, recipe, file, (said if said is not None else []).append)


def refused(model: Path, file: Path | None, recipe: Recipe = RECIPE) -> str:
    with pytest.raises(CalibrationError) as caught:
        prepare(model, file, recipe)
    return str(caught.value)


def real(batches: Batches) -> list[list[int]]:
    """The rows without their padding."""
    rows = zip(batches.input_ids, batches.mask, strict=True)
    return [row[mask].tolist() for row, mask in rows]


def test_a_text_fills_rows_that_all_start_with_bos(made: Path, file: Path) -> None:
    write(file, {"text": TEXT * 3})
    rows = real(prepare(made, file))
    tokenizer = tokens.load_tokenizer(made)
    ids = tokens.of_text(TEXT * 3, tokenizer)
    assert [len(row) for row in rows] == [16] * 4
    assert {row[0] for row in rows} == {tokenizer.bos_token_id}
    assert [token for row in rows for token in row[1:]] == ids[1 : 4 * 15 + 1]


def test_texts_share_rows_each_with_its_own_bos(made: Path, file: Path) -> None:
    write(file, {"text": "a fox"}, {"text": "a fox"})
    [row] = real(prepare(made, file))
    assert row == tokens.of_text("a fox", tokens.load_tokenizer(made)) * 2


def test_a_tokenizer_that_ends_documents_ends_no_rows(model: Path, file: Path) -> None:
    raw = Tokenizer.from_file(str(model / "tokenizer.json"))
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    raw.save(str(model / "tokenizer.json"))
    write(file, {"text": TEXT * 3})
    rows = real(prepare(model, file))
    assert [row[0] for row in rows] == [0] * 4
    assert not any(1 in row for row in rows)


def test_a_chat_goes_through_the_template(made: Path, file: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a fox"}]
    write(file, {"messages": turns, "source": "support"})
    [row] = real(prepare(made, file, Recipe(samples=4, length=64)))
    tokenizer = tokens.load_tokenizer(made)
    assert row == tokens.of_chat(turns, tokenizer, asks=False)
    assert row.count(tokenizer.bos_token_id or 0) == 1


def test_the_last_row_is_masked_where_it_ends(made: Path, file: Path) -> None:
    write(file, {"text": TEXT})
    batches = prepare(made, file)
    count = int(batches.mask[-1].sum())
    assert 0 < count < 16
    assert batches.mask[-1, :count].all() and not batches.input_ids[-1, count:].any()
    assert batches.report.tokens == int(batches.mask.sum())
    assert batches.report.samples == len(batches.input_ids) and batches.report.origin == "file"


def test_the_seed_decides_which_lines_are_used(made: Path, file: Path) -> None:
    write(file, *({"text": f"{number} " + TEXT} for number in range(20)))
    first, again, other = (
        prepare(made, file, Recipe(samples=4, length=16, seed=seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first.input_ids, again.input_ids)
    assert first.report.digest == again.report.digest != other.report.digest


def test_a_set_shorter_than_asked_is_told_and_used(made: Path, file: Path) -> None:
    write(file, {"text": "a fox"})
    said: list[str] = []
    assert prepare(made, file, said=said).report.samples == 1
    assert said == ["calibration has 1 rows of 16 tokens, fewer than the 4 asked for"]


def test_a_set_that_is_enough_is_not_talked_about(made: Path, file: Path) -> None:
    write(file, {"text": TEXT * 9})
    said: list[str] = []
    prepare(made, file, said=said)
    assert not said


def test_empty_lines_and_texts_are_passed_over(made: Path, file: Path) -> None:
    write(file, "", {"text": " \n"}, "   ", {"text": "a fox"})
    assert prepare(made, file).report.samples == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": ', "malformed line: Invalid JSON"),
        ("[1]", "malformed line: "),
        ('"a text"', "malformed line: "),
        ({"text": 5}, "malformed line: text: Input should be a valid string"),
        ({"messages": []}, "malformed line: messages: "),
        ({"messages": "hi"}, "malformed line: messages: "),
        ({"messages": ["hi"]}, "malformed line: messages: 0: "),
        ({"prompt": "hi"}, 'malformed line: its keys are "prompt"; expected "text", "messages", '),
        (
            {"text": "hi", "messages": [{}]},
            'malformed line: a line has either "text" or "messages"',
        ),
        ({"messages": [{}]}, "malformed line: messages: 0: a role is expected"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(
    made: Path, file: Path, line: Any, reason: str
) -> None:
    write(file, {"text": "a fox"}, "", line, {"text": "a dog"})
    assert refused(made, file).startswith(f"{file}:3: {reason}")


def test_bytes_that_are_no_text_are_named_by_their_line(made: Path, file: Path) -> None:
    file.write_bytes(b'{"text": "a fox"}\r\n{"text": "\xff"}\r\n')
    assert refused(made, file).startswith(f"{file}:2: malformed line: ")


@pytest.mark.parametrize("lines", [[], ["", " "], [{"text": ""}, {"text": "\n "}]])
def test_a_file_with_no_usable_line_is_refused(made: Path, file: Path, lines: list[Any]) -> None:
    write(file, *lines)
    assert refused(made, file).startswith(f"{file} has no usable line; expected ")


def test_a_file_that_cannot_be_read_is_named(made: Path, file: Path) -> None:
    assert refused(made, file) == f"{file} cannot be read: No such file or directory"
    file.mkdir()
    assert refused(made, file) == f"{file} cannot be read: Is a directory"


def test_messages_that_the_template_refuses_are_named(model: Path, file: Path) -> None:
    strict = "{% if messages[0].role == 'bot' %}{{ raise_exception('no bots') }}{% endif %}"
    (model / "chat_template.jinja").write_text(strict + tiny.CHAT_TEMPLATE)
    write(file, "", {"messages": [{"role": "bot", "content": "x"}]})
    assert refused(model, file) == (
        f"{file}:2: the chat template refuses these messages: no bots; mend the line or take it out"
    )


@pytest.mark.parametrize("turn", [{"role": "user"}, {"role": "user", "content": None}])
def test_a_message_without_content_says_nothing(made: Path, file: Path, turn: Any) -> None:
    write(file, {"messages": [turn]})
    (row,) = real(prepare(made, file))
    silent = tokens.of_chat(
        [{"role": "user", "content": ""}], tokens.load_tokenizer(made), asks=False
    )
    assert row == silent


def test_the_template_sees_all_that_belongs_to_a_line(model: Path, file: Path) -> None:
    shows = "{{ tools | tojson }}{{ documents | tojson }}{{ tone }}{{ messages | tojson }}"
    (model / "chat_template.jinja").write_text(shows)
    call = {"function": {"name": "f", "arguments": '{"a": 1}'}}
    turn = {"role": "assistant", "content": None, "reasoning_content": "so", "tool_calls": [call]}
    write(
        file,
        {
            "messages": [turn],
            "tools": json.dumps([{"function": {"name": "f"}}]),
            "documents": [{"title": "d"}],
            "chat_template_kwargs": {"tone": "dry"},
        },
    )
    (row,) = real(prepare(model, file, Recipe(samples=1, length=512)))
    text = tokens.load_tokenizer(model).decode(row)
    assert '"name": "f", "description": null' in text and '[{"title": "d"}]dry[' in text
    assert '"arguments": {"a": 1}' in text and '"reasoning": "so"' in text
    assert '"content": ""' in text


def test_lines_that_are_seen_or_heard_are_left_out_and_counted(made: Path, file: Path) -> None:
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    write(file, {"messages": [image]}, {"text": "a fox"}, {"messages": [image]})
    said: list[str] = []
    (row,) = real(prepare(made, file, said=said))
    assert row == tokens.of_text("a fox", tokens.load_tokenizer(made))
    assert said[0].startswith(f"2 of 3 lines of {file} are left out: they have images")
    write(file, {"messages": [image]})
    assert refused(made, file).startswith(f"{file} has no usable line without an image or a sound")


def test_a_template_that_writes_nothing_is_refused(model: Path, file: Path) -> None:
    (model / "chat_template.jinja").write_text("{# silence #}")
    write(file, {"messages": [{"role": "user", "content": "hi"}]})
    assert "the chat template writes nothing" in refused(model, file)


CHATS = [
    [{"role": "user", "content": asked + " well" * more}, {"role": "assistant", "content": answer}]
    for asked, more, answer in (("what is it?", 12, "a fox"), ("who runs?", 30, "the dog"))
]
ANSWERS = Recipe(samples=4, length=16, assistant_only=True)


def test_only_answers_count_and_every_row_has_one(made: Path, file: Path) -> None:
    write(file, {"text": TEXT}, *({"messages": chat} for chat in CHATS))
    batches = prepare(made, file, ANSWERS)
    tokenizer = tokens.load_tokenizer(made)
    counted = batches.input_ids[batches.counted].tolist()
    assert sorted(tokenizer.decode(counted).split("<|im_end|>")) == ["", "a fox", "the dog"]
    assert batches.counted.any(dim=1).all() and not (batches.counted & ~batches.mask).any()
    assert batches.report.tokens == len(counted)
    # What is before an answer is still there for it to attend to.
    whole = real(prepare(made, file, Recipe(samples=64, length=16)))
    assert all(row in whole for row in real(batches)) and len(whole) > len(batches.input_ids)


def test_without_the_option_every_real_token_counts(made: Path, file: Path) -> None:
    write(file, *({"messages": chat} for chat in CHATS))
    batches = prepare(made, file)
    assert torch.equal(batches.counted, batches.mask)
    other = prepare(made, file, ANSWERS)
    assert other.report.digest != batches.report.digest


def test_answers_are_asked_of_a_file_that_has_some(made: Path, file: Path) -> None:
    with pytest.raises(RecipeError, match="assistant-only counts the answers in a file of chats"):
        prepare(made, None, ANSWERS)
    write(file, {"text": TEXT})
    assert (
        refused(made, file, ANSWERS) == f"{file} has no answer of an assistant in any of its lines"
    )


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8"])
def test_answers_alone_make_an_artifact_and_the_manifest_says_how_many(
    made: Path, file: Path, scheme: str
) -> None:
    """Whose questions are longer than what the solver samples of a row."""
    turns = [
        [{"role": "user", "content": line}, {"role": "assistant", "content": line[:40]}]
        for line in letters(seed=2)
    ]
    write(file, *({"messages": chat} for chat in turns))
    asked: dict[str, Any] = {"scheme": scheme, "assistant_only": True}
    found = quantize(made, file.parent / "out", texts=file, samples=24, length=200, **asked)
    report = found.manifest.calibration
    assert 128 < report.tokens < 24 * 200 / 2 and report.widest_input == 128
    assert found.manifest.recipe["assistant_only"] is True
    assert all(0 <= layer.loss < 1 for layer in found.manifest.layers)
    assert not [line for line in found.told.lines if "widest layer" in line]


def test_a_run_on_too_few_tokens_says_so(made: Path, file: Path) -> None:
    write(file, {"text": "a"})
    found = quantize(made, file.parent / "out", texts=file)
    assert found.manifest.calibration.tokens == 2
    assert found.manifest.calibration.widest_input == 128
    assert [line for line in found.told.lines if "has 2 tokens, and the widest layer 128" in line]


def test_fewer_tokens_than_the_widest_layer_reads_are_warned_of(made: Path, file: Path) -> None:
    write(file, {"text": TEXT * 3})
    batches, said = prepare(made, file), list[str]()
    held = calibration.held_against(batches, [64, 128, 64], said.append)
    assert held.report.widest_input == 128 and held.report.tokens == 64
    (line,) = said
    assert line.startswith(
        "calibration has 64 tokens, and the widest layer 128 inputs: give at lea"
    )
    calibration.held_against(batches, [64], said.append)
    assert len(said) == 1
    older = batches.report.model_dump(exclude={"widest_input"})
    assert CalibrationReport.model_validate(older).widest_input is None


def test_rows_longer_than_the_model_reads_are_refused(made: Path, file: Path) -> None:
    with pytest.raises(RecipeError, match="length 513 exceeds the model's 512 positions"):
        prepare(made, file, Recipe(length=513))


@pytest.mark.parametrize("given_file", [True, False], ids=["file", "self-written"])
def test_another_models_tokenizer_is_noticed(model: Path, file: Path, given_file: Any) -> None:
    made = tokens.load_tokenizer(model)
    made.add_tokens(["zebra"])
    made.chat_template = "{{ bos_token }}zebra {{ messages[0].content }}"
    made.save_pretrained(model)
    write(file, {"text": "a zebra"})
    message = refused(model, file if given_file else None)
    assert message.startswith("token 320 is beyond the model's vocabulary of 320: ")


def test_without_a_file_the_model_writes_the_rows(made: Path, tmp_path: Path) -> None:
    opened = source.open(str(made), cache=tmp_path)
    batches = calibration.prepare(opened, RECIPE, None, source.quiet)
    assert batches.input_ids.shape == (4, 16) and batches.mask.all()
    assert batches.report.origin == "self-generated"
    assert (batches.report.samples, batches.report.tokens) == (4, 64)


@given(
    documents=st.lists(st.lists(st.integers(1, 99), max_size=40), max_size=8),
    length=st.integers(2, 12),
    samples=st.integers(1, 9),
)
def test_packing_loses_nothing_and_marks_every_cut(
    documents: list[list[int]], length: int, samples: int
) -> None:
    rows = list(itertools.islice(pack(iter(documents), length, bos=[0]), samples))
    assert len(rows) <= samples
    assert all(len(row) == length for row in rows[:-1])
    assert all(0 < len(row) <= length for row in rows)
    packed = [token for row in rows for token in row if token != 0]
    whole = list(itertools.chain.from_iterable(documents))
    assert packed == whole[: len(packed)]
    assert len(packed) == len(whole) or len(rows) == samples
    starts = set(itertools.accumulate(map(len, documents)))
    done = 0
    for place, row in enumerate(rows):
        cut = place > 0 and done not in starts
        assert (row[0] == 0) == cut
        done += sum(token != 0 for token in row)
