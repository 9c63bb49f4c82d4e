"""What travels with an adapter: read from its folder, part of its digest, held against the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quant.errors import AdapterError
from quant.lora import adapter, fitting, voice
from quant.lora.voice import FILES, Voice
from tests import tiny
from tests.lora import write_lora

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
KNOWN = {"<s>": 0, "</s>": 1, "<|im_end|>": 3, "hello": 9}


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "lora", {"model.layers.0.mlp.up_proj": (8, 6)})


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def test_an_adapter_of_weights_alone_has_no_voice_and_keeps_its_digest(lora: Path) -> None:
    before = adapter.read(lora)
    write(lora, "tokenizer_config.json", {"model_max_length": 512, "tokenizer_class": "X"})
    assert before.voice == Voice() and adapter.read(lora).digest == before.digest


def test_every_part_of_a_voice_is_part_of_the_digest(lora: Path) -> None:
    digests = {adapter.read(lora).digest}
    for name, content in {
        "chat_template.jinja": TEMPLATE,
        "generation_config.json": {"temperature": 0.5},
        "tokenizer_config.json": {"eos_token": "<|im_end|>"},
    }.items():
        write(lora, name, content)
        digests.add(adapter.read(lora).digest)
    assert len(digests) == 4
    write(lora, "generation_config.json", {"temperature": 0.5, "transformers_version": "5"})
    assert adapter.read(lora).digest in digests  # what changes no answer is no part of it


def test_generation_defaults_have_the_names_of_the_server(lora: Path) -> None:
    asked = {"temperature": 0, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1, "min_p": None,
             "max_new_tokens": 64, "eos_token_id": [3, 9], "stop_strings": "END",
             "do_sample": True, "num_beams": 4}  # fmt: skip
    write(lora, "generation_config.json", asked)
    found = voice.read(lora)
    assert found.defaults == {"temperature": 0, "top_k": 20, "top_p": 0.9,
                              "repetition_penalty": 1.1, "max_tokens": 64}  # fmt: skip
    assert (found.eos, found.stop, found.ignored) == ((3, 9), ("END",), ("num_beams",))
    assert "temperature 0" in found.told() and "stops at 'END'" in found.told()


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"top_p": 0}, {"top_p": "high"}, {"max_new_tokens": 0},
     {"repetition_penalty": float("inf")}, {"eos_token_id": "</s>"}, {"top_k": 2.5},
     {"temperature": 1e308}, {"top_k": 10**20}, {"top_p": 1e-320}, {"repetition_penalty": 1e-320},
     {"max_new_tokens": 10**30}, {"eos_token_id": -1}, {"eos_token_id": [2, 1 << 31]},
     {"eos_token_id": [2] * 257}, {"stop_strings": ""}, {"stop_strings": ["a", ""]},
     {"stop_strings": ["x" * 257]}, {"stop_strings": ["x"] * 65}, {"stop_strings": [3]}],
)  # fmt: skip
def test_a_default_that_cannot_be_is_named(lora: Path, wrong: dict[str, Any]) -> None:
    write(lora, "generation_config.json", wrong)
    with pytest.raises(AdapterError, match=r"generation_config\.json") as refusal:
        voice.read(lora)
    assert refusal.value.field == next(iter(wrong))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("generation_config.json", {"stop_strings": ["\ud800"]}),
        ("tokenizer_config.json", {"chat_template": "\udfff"}),
        ("tokenizer_config.json", {"eos_token": "\ud83d"}),
        ("added_tokens.json", {"\ud83d": 3}),
    ],
)
def test_half_a_character_is_no_text(lora: Path, name: str, content: dict[str, Any]) -> None:
    write(lora, name, content)
    with pytest.raises(AdapterError, match=r"no Unicode text|as a unicode string"):
        voice.read(lora)


def test_the_template_file_goes_before_the_tokenizers(lora: Path) -> None:
    named = [{"name": "default", "template": "old"}, {"name": "tool_use", "template": "tools"},
             {"name": "rag", "template": "unknown"}]  # fmt: skip
    write(lora, "tokenizer_config.json", {"chat_template": named})
    assert voice.read(lora).templates == {"default": "old", "tool_use": "tools"}
    write(lora, "chat_template.jinja", TEMPLATE)
    found = voice.read(lora)
    assert (found.template(tools=False), found.template(tools=True)) == (TEMPLATE, "tools")
    write(lora, "tokenizer_config.json", {"chat_template": "plain"})
    assert voice.read(lora).template(tools=True) == TEMPLATE


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_are_bounded_and_damage_is_named(lora: Path, name: str) -> None:
    (lora / name).parent.mkdir(exist_ok=True)
    (lora / name).write_bytes(b"\xff\xfe[")
    with pytest.raises(AdapterError) as damaged:
        voice.read(lora)
    assert damaged.value.field == Path(name).name
    with (lora / name).open("wb") as file:
        file.truncate(FILES[name] + 1)
    with pytest.raises(AdapterError, match="larger than") as large:
        voice.read(lora)
    assert large.value.field == Path(name).name


def test_a_template_inside_the_configuration_is_bounded_too(lora: Path) -> None:
    write(
        lora, "tokenizer_config.json", {"chat_template": "x" * (FILES["chat_template.jinja"] + 1)}
    )
    with pytest.raises(AdapterError, match="characters"):
        voice.read(lora)


def test_the_same_tokenizer_needs_nothing(tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "lora"
    tiny.tokenizer(base)
    tiny.tokenizer(folder)
    known = voice.vocabulary(base)
    assert known is not None and len(known) == tiny.VOCAB and known["<|im_end|>"] == 3
    found = fitting.fitted(voice.read(folder), known, folder)
    assert found.eos == (3,), "the tokenizer's EOS ends an answer"


@pytest.mark.parametrize("release", ["5", "4"])
def test_tokens_that_the_base_lacks_are_refused_with_the_way_out(
    tmp_path: Path, release: str
) -> None:
    base, folder = tmp_path / "base", tmp_path / "lora"
    tiny.tokenizer(base)
    theirs = tiny.tokenizer(folder)
    theirs.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    theirs.save_pretrained(folder)
    if release == "4":  # a list of added tokens beside the tokenizer, which is left out
        (folder / "tokenizer.json").unlink()
        decoder = {"320": {"content": "<|tool|>", "special": True}}
        tiny.edit_json(folder / "tokenizer_config.json", added_tokens_decoder=decoder)
    known = voice.vocabulary(base)
    assert known is not None
    with pytest.raises(AdapterError, match=r"'<\|tool\|>'.*adapter merge"):
        voice.check_tokens(voice.read(folder), known, folder)


def test_a_new_padding_token_is_no_obstacle(lora: Path) -> None:
    write(lora, "added_tokens.json", {"[PAD]": 320})
    write(lora, "tokenizer_config.json", {"pad_token": {"content": "[PAD]"}, "eos_token": "</s>"})
    voice.check_tokens(voice.read(lora), KNOWN, lora)
    write(lora, "tokenizer_config.json", {"pad_token": "[PAD]", "eos_token": "[PAD]"})
    with pytest.raises(AdapterError, match=r"\[PAD\]"):
        voice.check_tokens(voice.read(lora), KNOWN, lora)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", {"hello": 10}),
        ("tokenizer_config.json", {"bos_token": "<start>"}),
        ("generation_config.json", {"eos_token_id": 77}),
    ],
)
def test_what_the_base_numbers_otherwise_is_refused(
    lora: Path, name: str, content: dict[str, Any]
) -> None:
    write(lora, name, content)
    with pytest.raises(AdapterError):
        voice.check_tokens(voice.read(lora), KNOWN, lora)


def test_a_unigram_vocabulary_is_read_in_order(tmp_path: Path) -> None:
    pieces = {"model": {"vocab": [["<unk>", 0], ["a", -1.5]]},
              "added_tokens": [{"id": 2, "content": "<x>"}]}  # fmt: skip
    write(tmp_path, "tokenizer.json", pieces)
    assert voice.vocabulary(tmp_path) == {"<unk>": 0, "a": 1, "<x>": 2}
    assert voice.vocabulary(tmp_path / "elsewhere") is None
