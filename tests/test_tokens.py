"""Texts and chats become the tokens that the server would make of them."""

from __future__ import annotations

import logging
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from quant import tokens
from quant.conversation import Chat
from quant.errors import CalibrationError, SourceError, TemplateRefusal
from quant.lora import cell
from tests import tiny
from tests.chats import TOOLS

TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "what is it?"},
    {"role": "assistant", "content": "a fox"},
]


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
    tokenizer.chat_template = "today is {{ strftime_now('%d %b %Y') }}"
    assert tokenizer.decode(tokens.of_chat(TURNS, tokenizer, asks=True)) == "today is 01 Jan 2026"


def test_a_date_of_the_templates_own_is_the_servers(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{{ date_string if date_string is defined else '26 Jul 2024' }}"
    assert tokenizer.decode(tokens.of_chat(TURNS, tokenizer, asks=True)) == "26 Jul 2024"


def test_without_a_template_a_chat_is_its_contents(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    expected = tokens.of_text("what is it?\na fox\n", tokenizer)
    assert tokens.of_chat(TURNS, tokenizer, asks=True) == expected
    parts = [{"role": "user", "content": [{"type": "text", "text": "what is it?"}]}, TURNS[1]]
    assert tokens.of_chat(parts, tokenizer, asks=True) == expected
    silent = [*TURNS, {"role": "assistant", "content": None}]
    assert tokens.of_chat(silent, tokenizer, asks=True) == tokens.of_text(
        "what is it?\na fox\n\n", tokenizer
    )


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('only users here') }}", "only users here"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].content + 5 }}", "can only concatenate str"),
        ("{{ messages[0]['content'].nothing.at }}", "nothing"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_a_template_may_refuse(
    template: str, says: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(TemplateRefusal, match=says):
        tokens.of_chat(TURNS, tokenizer, asks=True)


def test_several_templates_are_taken_as_a_server_takes_them(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer.chat_template = {"default": "plain", "tool_use": "with tools"}
    for tools, expected in ((None, "plain"), ([], "plain"), (TOOLS, "with tools")):
        ids = tokens.of_chat(Chat(TURNS, tools), tokenizer, asks=True)
        assert tokenizer.decode(ids) == expected


@pytest.mark.parametrize("own", [None, "own"])
def test_a_processors_template_goes_before_the_tokenizers(own: str | None, tmp_path: Path) -> None:
    made = tiny.tokenizer(tmp_path, chat=False)
    made.chat_template = own
    made.save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text('{"chat_template": "processor"}')
    assert tokens.load_tokenizer(tmp_path).chat_template == own  # of no model that sees
    (tmp_path / "preprocessor_config.json").write_text("{}")
    both = tokens.load_tokenizer(tmp_path)
    assert both.decode(tokens.of_chat(TURNS, both, asks=True)) == "processor"
    with_tools = both.decode(tokens.of_chat(Chat(TURNS, TOOLS), both, asks=True))
    assert with_tools == (own or "processor")


SAID = ["the quick brown fox jumps over the lazy dog", "a fox, ä dog and é\n\n bird 😀 aaaaaaaaa"]


def byte_level() -> Tokenizer:
    """As GPT-2's and what came after it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.train_from_iterator(SAID, trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))  # fmt: skip
    return made


def whole_texts() -> Tokenizer:
    """As Llama-2's: pairs are merged in the whole text at once, and blanks are letters."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.train_from_iterator(SAID, trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<|im_end|>"], show_progress=False))  # fmt: skip
    return made


def likeliest() -> Tokenizer:
    """As T5's and XLM-R's: the likeliest of all ways to divide a text."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.train_from_iterator(SAID, trainers.UnigramTrainer(
        vocab_size=80, special_tokens=["<unk>", "<|im_end|>"], unk_token="<unk>",
        show_progress=False))  # fmt: skip
    return made


TOKENIZERS = [
    PreTrainedTokenizerFast(tokenizer_object=made(), unk_token="<unk>")
    for made in (byte_level, whole_texts, likeliest)
]
WORDS = st.sampled_from(["the quick ", "fox", " ", "\n\n", "<|im_end|>", "ä", "é", "😀", "a" * 9])


@given(
    words=st.lists(WORDS, min_size=1, max_size=60),
    times=st.integers(1, 90),
    most=st.integers(1, 300),
)
def test_the_first_tokens_of_a_long_text_are_the_whole_texts(
    words: list[str], times: int, most: int
) -> None:
    text = "".join(words) * times
    for made in TOKENIZERS:
        whole = made(text, verbose=False)["input_ids"]
        assert tokens.of_text(text, made, most) == whole[:most]


def test_no_more_of_a_text_is_read_than_its_tokens_take() -> None:
    """Ten million characters would take a minute; what is encoded is counted."""
    read: list[int] = []

    class Counting(PreTrainedTokenizerFast):  # type: ignore[misc] # transformers is untyped
        def __call__(self, text: Any, *args: Any, **settings: Any) -> Any:
            read.append(len(text))
            return super().__call__(text, *args, **settings)

    text = "the quick brown fox jumps over the lazy dog and runs " * 200_000
    ids = tokens.of_text(text, Counting(tokenizer_object=byte_level()), 1024)
    assert len(ids) == 1024 and sum(read) < 64 * 1024


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


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for message in messages %}", "Unexpected end of template"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "took"),
    ],
    ids=["no template", "no end"],
)
def test_a_template_that_is_none_or_does_not_end_is_named(
    template: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is asked of it: it would hold whoever renders a chat."""
    monkeypatch.setattr(cell, "PATIENCE_S", 1.0)
    tiny.tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(SourceError, match=f"its chat template: .*{says}.*; mend it or take it out"):
        tokens.load_tokenizer(tmp_path)


def test_a_token_beyond_the_vocabulary_is_named() -> None:
    tokens.check_vocabulary([3, 319, 7], 320)
    tokens.check_vocabulary([], 320)
    with pytest.raises(CalibrationError, match=r"token 320 is beyond .* vocabulary of 320: the to"):
        tokens.check_vocabulary([3, 320, 7], 320)
