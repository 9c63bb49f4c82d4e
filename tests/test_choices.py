"""`proof.choices`: questions as the server would see them; a bad line is named by its number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from quant import tokens
from quant.errors import CalibrationError
from quant.proof import choices
from tests import tiny

GOOD = {"question": "what runs?", "choices": ["the fox", "the dog jumps"], "answer": 1}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))


def written(folder: Path, *lines: Any) -> Path:
    file = folder / "quiz.jsonl"
    file.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return file


def test_a_question_is_asked_through_the_chat_template(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    quiz = choices.read(written(tmp_path, GOOD, "", GOOD | {"subject": "x"}), tokenizer, 512)
    assert (quiz.name, len(quiz.questions)) == ("quiz.jsonl", 2)
    [question, same] = quiz.questions
    turn = {"role": "user", "content": "what runs?"}
    assert list(question.asked) == tokens.of_chat([turn], tokenizer, asks=True)
    assert [tokenizer.decode(list(ids)) for ids in question.choices] == GOOD["choices"]
    assert question.answer == 1 and same == question


def test_without_a_template_it_is_asked_plainly(tmp_path: Path) -> None:
    plain = tiny.tokenizer(tmp_path / "plain", chat=False)
    [question] = choices.read(written(tmp_path, GOOD), plain, 512).questions
    assert list(question.asked) == tokens.of_text("what runs?\n", plain)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{never closed", "malformed line"),
        (GOOD | {"answer": 2}, "answer is 2; an index of the 2 choices"),
        (GOOD | {"answer": "B"}, "answer: "),
        (GOOD | {"choices": ["alone"]}, "choices: "),
        (GOOD | {"choices": ["", "x"]}, "has no tokens"),
        (GOOD | {"question": "why " * 600}, "the model has 512 positions"),
        ({"question": "what?"}, "choices: Field required"),
    ],
)
def test_a_bad_line_is_named(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, line: Any, says: str
) -> None:
    with pytest.raises(CalibrationError, match=r"quiz\.jsonl:2: ") as caught:
        choices.read(written(tmp_path, GOOD, line), tokenizer, 512)
    assert says in str(caught.value)


def test_a_template_that_refuses_is_named_with_the_line(tmp_path: Path) -> None:
    strict = tiny.tokenizer(tmp_path / "strict")
    strict.chat_template = "{{ raise_exception('no questions here') }}"
    with pytest.raises(CalibrationError, match=r"quiz\.jsonl:1: .*no questions here"):
        choices.read(written(tmp_path, GOOD), strict, 512)


def test_a_file_without_questions_is_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError, match="has no question"):
        choices.read(written(tmp_path, "", " "), tokenizer, 512)
    with pytest.raises(CalibrationError, match=r"nowhere\.jsonl cannot be read"):
        choices.read(tmp_path / "nowhere.jsonl", tokenizer, 512)
