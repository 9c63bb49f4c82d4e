"""A converted tokenizer does what the file's keys say, once AutoTokenizer has read it again."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFWriter
from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerBase

from quant import tokens
from quant.errors import SourceError
from quant.intake import gguf_header, gguf_tokenizer
from quant.intake.gguf_keys import Keys
from tests import tiny, tiny_gguf

PIECES = ["<unk>", "<s>", "</s>", "<mark>", *(f"<0x{n:02X}>" for n in range(256))]
WORDS = ["\u2581", "a", "b", "ab", "\u2581a", "\u2581ab", "\u2581\u2581", "<turn>"]


class File:
    """Keys of a tokenizer alone, changed by name and written as a file of their own."""

    def __init__(self, folder: Path, architecture: str = "llama") -> None:
        self.folder = folder
        self.writer = GGUFWriter(folder / "model.gguf", architecture)

    def bytes_(self, pre: str = "gpt-2", *, more: tuple[str, ...] = ()) -> File:
        tiny.tokenizer(self.folder)
        told = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        vocabulary = told.get_vocab()
        words = [*sorted(vocabulary, key=vocabulary.__getitem__), *more]
        self.writer.add_tokenizer_model("gpt2")
        self.writer.add_tokenizer_pre(pre)
        self.writer.add_token_list(words)
        self.writer.add_token_types([3] * 4 + [1] * (len(words) - 4))
        self.writer.add_token_merges(["t h"])
        return self

    def pieces(self) -> File:
        words = [*PIECES, *WORDS]
        self.writer.add_tokenizer_model("llama")
        self.writer.add_tokenizer_pre("default")
        self.writer.add_token_list(words)
        self.writer.add_token_scores([-float(place) for place in range(len(words))])
        self.writer.add_token_types([2, 3, 3, 3, *[6] * 256, *[1] * (len(WORDS) - 1), 4])
        return self

    def ids(self, **ids: int) -> File:
        for name, number in ids.items():
            self.writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
        return self

    def flags(self, **flags: bool) -> File:
        for name, value in flags.items():
            self.writer.add_bool(f"tokenizer.ggml.{name}", value)
        return self

    def keys(self) -> Keys:
        return Keys(gguf_header.read(tiny_gguf.finish(self.writer)))

    def written(self) -> PreTrainedTokenizerBase:
        made = self.folder / "made"
        made.mkdir()
        gguf_tokenizer.write(self.keys(), made)
        return tokens.load_tokenizer(made)


def around(made: PreTrainedTokenizerBase, text: str = "ab") -> tuple[bool, bool]:
    """Whether BOS and EOS stand there, as the library that servers use has it too."""
    ids = tokens.of_text(text, made)
    raw = Tokenizer.from_file(f"{made.name_or_path}/tokenizer.json").encode(text).ids
    assert raw == ids
    return ids[0] == made.bos_token_id, ids[-1] == made.eos_token_id


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "phi3"])
@pytest.mark.parametrize(
    ("bos", "eos"), [(True, False), (False, False), (True, True), (False, True)]
)
def test_a_text_gets_the_ends_that_the_file_says(
    architecture: str, tmp_path: Path, *, bos: bool, eos: bool
) -> None:
    file = File(tmp_path, architecture).pieces().ids(bos=1, eos=2, unknown=0)
    made = file.flags(add_bos_token=bos, add_eos_token=eos, add_space_prefix=False).written()
    assert around(made) == (bos, eos)


@pytest.mark.parametrize(
    ("pre", "said", "bos"),
    [
        ("gpt-2", None, False),
        ("llama-bpe", None, True),
        ("tekken", None, True),
        ("qwen2", None, False),
        ("llama-bpe", False, False),
        ("qwen2", True, True),
    ],
)
def test_where_a_file_says_nothing_its_kind_does(
    pre: str, tmp_path: Path, *, said: bool | None, bos: bool
) -> None:
    file = File(tmp_path).bytes_(pre).ids(bos=0, eos=3)
    made = (file if said is None else file.flags(add_bos_token=said)).written()
    assert around(made) == (bos, False)


def test_pieces_begin_with_bos_where_the_file_says_nothing(tmp_path: Path) -> None:
    assert around(File(tmp_path).pieces().ids(bos=1, eos=2).written()) == (True, False)


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
@pytest.mark.parametrize("prefix", [None, True, False])
def test_a_space_before_a_text_is_there_as_the_file_says(
    architecture: str, tmp_path: Path, *, prefix: bool | None
) -> None:
    file = File(tmp_path, architecture).pieces().flags(add_bos_token=False)
    made = (file if prefix is None else file.flags(add_space_prefix=prefix)).written()
    expected = ["ab"] if prefix is False else ["\u2581ab"]
    assert made.tokenize("ab") == expected
    assert made.decode(tokens.of_text("ab ab", made)) == "ab ab"


def cut(made: PreTrainedTokenizerBase, text: str) -> list[str]:
    backend = Tokenizer.from_file(f"{made.name_or_path}/tokenizer.json")
    return [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["Ġ", "Ġ123"]),
        ("smollm", ["ĠĠ", "1", "2", "3"]),
        ("starcoder", ["ĠĠ", "1", "2", "3"]),
        ("llama-bpe", ["Ġ", "Ġ", "123"]),
        ("qwen2", ["Ġ", "Ġ", "1", "2", "3"]),
        ("stablelm2", ["Ġ", "Ġ", "1", "2", "3"]),
    ],
)
def test_text_is_cut_as_the_file_says(pre: str, pieces: list[str], tmp_path: Path) -> None:
    assert cut(File(tmp_path).bytes_(pre).written(), "  123") == pieces


@pytest.mark.parametrize(("pre", "whole"), [("llama-bpe", True), ("qwen2", False)])
def test_a_word_that_is_a_token_stays_whole_where_the_kind_keeps_it(
    pre: str, tmp_path: Path, *, whole: bool
) -> None:
    """No merges lead to it: Llama 3's tokenizer takes it all the same."""
    made = File(tmp_path).bytes_(pre, more=("qqq",)).written()
    assert (made.tokenize("qqq") == ["qqq"]) is whole


def test_no_mark_of_another_model_comes_along(tmp_path: Path) -> None:
    """transformers' classes bring theirs, which have no embeddings."""
    made = File(tmp_path).bytes_().ids(bos=0, eos=3).written()
    assert len(made) == tiny.VOCAB
    assert max(tokens.of_text("<|endoftext|> <unk> <pad>", made)) < tiny.VOCAB


@pytest.mark.parametrize("mark", ["<\uff5cUser\uff5c>", "<|turn|>", "    ", "<a b>"])
@pytest.mark.parametrize("kind", [3, 4])
def test_a_mark_is_never_cut_apart(mark: str, kind: int, tmp_path: Path) -> None:
    """Whatever letters it is made of, and under the id that the file gives it."""
    file = File(tmp_path).bytes_(more=(mark,)).ids(bos=tiny.VOCAB if kind == 3 else 0, eos=3)
    file.writer.kv_data[0]["tokenizer.ggml.token_type"].value[-1] = kind
    made = file.written()
    assert len(made) == tiny.VOCAB + 1
    ids = made.encode(f"fox{mark}dog", add_special_tokens=False)
    assert ids.count(tiny.VOCAB) == 1
    assert made.decode(ids) == f"fox{mark}dog"
    assert made.decode(ids, skip_special_tokens=True) == (
        "foxdog" if kind == 3 else f"fox{mark}dog"
    )


def test_blanks_among_pieces_are_told_as_the_pieces_are(tmp_path: Path) -> None:
    """Gemma's runs of blanks are marks, stored with real blanks; they count as other pieces do."""
    file = File(tmp_path, "gemma3").pieces()
    held = file.writer.kv_data[0]
    held["tokenizer.ggml.tokens"].value[-2] = "  "
    held["tokenizer.ggml.token_type"].value[-2] = 4
    made = file.flags(add_bos_token=False, add_space_prefix=False).written()
    assert len(made) == len(PIECES) + len(WORDS)
    assert made.tokenize("a  b") == ["a", "\u2581\u2581", "b"]


def test_every_template_of_a_file_is_kept(tmp_path: Path) -> None:
    file = File(tmp_path).bytes_()
    file.writer.add_chat_template(
        [{"name": "default", "template": "{{ 1 }}"}, {"name": "tool_use", "template": "{{ 2 }}"}]
    )
    made = file.written()
    assert made.get_chat_template() == "{{ 1 }}"
    assert made.get_chat_template("tool_use") == "{{ 2 }}"


def test_all_that_ends_an_answer_is_told(tmp_path: Path) -> None:
    keys = File(tmp_path).bytes_().ids(bos=0, eos=3, eot=1, eom=3).keys()
    assert gguf_tokenizer.ends(keys) == [3, 1]
    assert GenerationConfig(eos_token_id=gguf_tokenizer.ends(keys)).eos_token_id == [3, 1]


REFUSED = {
    "pre": "tokenizer.ggml.pre is mystery",
    "model": "tokenizer.ggml.model is rwkv",
    "merges": "merges has 'a qqqq', which makes no token",
    "scores": "scores has 2 entries",
    "twice": "of them apart",
    "sep": "add_sep_token is true",
    "eos": "add_eos_token is true, and no eos is named",
    "beyond": "bos_token_id is 320, and there are 320 tokens",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_tokenizer_here_does_is_named(case: str, tmp_path: Path) -> None:
    file = File(tmp_path).bytes_("mystery" if case == "pre" else "gpt-2")
    held = file.writer.kv_data[0]
    if case == "model":
        held["tokenizer.ggml.model"].value = "rwkv"
    if case == "merges":
        held["tokenizer.ggml.merges"].value.append("a qqqq")
    if case == "scores":
        file.writer.add_token_scores([1.0, 2.0])
    if case == "twice":
        held["tokenizer.ggml.tokens"].value[5] = held["tokenizer.ggml.tokens"].value[6]
    if case == "sep":
        file.flags(add_sep_token=True)
    if case == "eos":
        file.flags(add_eos_token=True)
    if case == "beyond":
        file.ids(bos=tiny.VOCAB)
    with pytest.raises(SourceError) as told:
        file.written()
    assert REFUSED[case] in str(told.value)
