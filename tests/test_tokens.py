"""Texts and chats become the tokens that the server would make of them."""

from __future__ import annotations

import logging
from logging.handlers import BufferingHandler
from pathlib import Path

import jinja2
import pytest
from transformers import PreTrainedTokenizerBase

from quant import tokens
from quant.errors import CalibrationError, SourceError
from tests import tiny

TURNS = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a fox"}]


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    tiny.tokenizer(tmp_path)
    return tokens.load_tokenizer(tmp_path)


def test_a_text_starts_with_bos_and_reads_back(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokens.of_text("the quick fox", tokenizer)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == "the quick fox"


def test_a_chat_is_what_the_template_makes_of_it(tokenizer: PreTrainedTokenizerBase) -> None:
    for asks in (False, True):
        ids = tokens.of_chat(TURNS, tokenizer, asks=asks)
        assert ids == tokenizer.apply_chat_template(
            TURNS, add_generation_prompt=asks, return_dict=False
        )


def test_a_chat_has_one_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokens.of_chat(TURNS, tokenizer, asks=False)
    assert ids[0] == tokenizer.bos_token_id and ids.count(ids[0]) == 1


def test_asking_opens_the_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    told, asked = (tokens.of_chat(TURNS, tokenizer, asks=asks) for asks in (False, True))
    assert asked[: len(told)] == told
    assert tokenizer.decode(asked[len(told) :]) == "<|im_start|>assistant\n"


def test_a_date_in_a_template_is_always_the_same(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "today is {{ date_string }}"
    assert tokenizer.decode(tokens.of_chat(TURNS, tokenizer, asks=True)) == "today is 1 Jan 2026"


def test_without_a_template_a_chat_is_its_contents(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    expected = tokens.of_text("what is it?\na fox\n", tokenizer)
    assert tokens.of_chat(TURNS, tokenizer, asks=True) == expected


def test_a_template_may_refuse(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{{ raise_exception('only users here') }}"
    with pytest.raises(jinja2.TemplateError, match="only users here"):
        tokens.of_chat(TURNS, tokenizer, asks=True)


def test_a_long_text_is_no_reason_to_warn(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.model_max_length = 8
    heard = BufferingHandler(100)
    logging.getLogger("transformers").addHandler(heard)
    try:
        assert len(tokens.of_text("the quick brown fox " * 20, tokenizer)) > 8
        assert len(tokens.of_chat(TURNS, tokenizer, asks=True)) > 8
    finally:
        logging.getLogger("transformers").removeHandler(heard)
    assert heard.buffer == []


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path)
    with pytest.raises(SourceError, match=rf"^{tmp_path} has no tokenizer that can be read: "):
        tokens.load_tokenizer(tmp_path)


def test_a_broken_tokenizer_is_named(tmp_path: Path) -> None:
    tiny.model_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(SourceError, match=rf"^{tmp_path} has no tokenizer that can be read: "):
        tokens.load_tokenizer(tmp_path)


def test_a_token_beyond_the_vocabulary_is_named() -> None:
    tokens.check_vocabulary([3, 319, 7], 320)
    tokens.check_vocabulary([], 320)
    with pytest.raises(CalibrationError, match=r"token 320 is beyond .* vocabulary of 320: the to"):
        tokens.check_vocabulary([3, 320, 7], 320)
