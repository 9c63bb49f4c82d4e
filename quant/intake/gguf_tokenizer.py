"""The tokenizer that a GGUF file describes, built by transformers and then held against the file.

Knows how llama.cpp cuts text for each `tokenizer.ggml.pre`, and whether it puts BOS and EOS around
a text where the file does not say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations.gguf.gguf_tokenizer_mapping import (
    GGUF_PRE_TOKENIZER_SPLITS,
    convert_gguf_tokenizer,
)

from quant import tokens
from quant.intake.gguf_keys import Keys

_BYTES, _PIECES = "gpt2", "llama"  # llama.cpp's names of byte-level BPE and of sentencepiece
# https://github.com/ggml-org/llama.cpp, src/llama-vocab.cpp: how text is cut before it is merged.
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b",
           "mellum2")  # fmt: skip
_PLAIN = ("", "default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat", "exaone4", "mellum",
          "a.x-4.0", "trillion", "granite-docling")  # fmt: skip
_AS_QWEN2 = ("stablelm2", "hunyuan", "solar-open")
# And for which of them a word that is a token is taken whole, and BOS is put first by default.
_WHOLE = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
          "jina-v5-nano", "tekken")  # fmt: skip
_IDS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_ENDS = ("eos", "eot", "eom")
# Marks that people write into prompts, and those of models with other tasks.
_UNUSED = ("fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep", "prefix", "suffix",
           "middle", "mask", "seperator", "cls")  # fmt: skip
_MARKS = (3, 4)  # types of tokens that are never cut apart: control marks, and what users defined
_TEMPLATE = "tokenizer.chat_template"
_KEY = "tokenizer.ggml."


def token_id(keys: Keys, name: str) -> int | None:
    """Of a special token; None where the file has none. SourceError where it is no token's."""
    key = f"{_KEY}{name}_token_id"
    if key not in keys:
        return None
    found, count = keys.whole(key), len(keys.texts(f"{_KEY}tokens"))
    if found >= count:
        raise keys.header.refused(
            f"{key} is {found}, and there are {count} tokens: convert the model again"
        )
    return found


def ends(keys: Keys) -> list[int]:
    """Ids of the tokens that end an answer."""
    found = (token_id(keys, name) for name in _ENDS)
    return list(dict.fromkeys(number for number in found if number is not None))


def write(keys: Keys, folder: Path) -> None:
    """The files that AutoTokenizer reads. SourceError names what is not followed."""
    vocabulary = _vocabulary(keys)
    odd = _odd(vocabulary)
    words = [odd.get(number, word) for number, word in enumerate(vocabulary["tokens"])]
    try:
        backend, _ = convert_gguf_tokenizer(keys.architecture, {**vocabulary, "tokens": words})
    except (ValueError, LookupError, TypeError) as fault:
        reason = " ".join(str(fault).split())[:300]
        raise keys.header.refused(f"its tokenizer cannot be built: {reason}") from fault
    backend = _own(backend, vocabulary, odd)
    _split(keys, backend)
    _prefix(keys, backend)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, **_special(keys, vocabulary), **_around(keys)
    )
    made.chat_template = _templates(keys)
    made.save_pretrained(folder)
    _check(keys, tokens.load_tokenizer(folder), vocabulary)


def _vocabulary(keys: Keys) -> dict[str, Any]:
    """As transformers' builders want it."""
    kind, found = keys.text(f"{_KEY}model"), keys.texts(f"{_KEY}tokens")
    if kind not in (_BYTES, _PIECES):
        raise keys.header.refused(f"{_KEY}model is {kind}, and {_BYTES} and {_PIECES} are known")
    if len(set(found)) != len(found) or not found:
        raise keys.header.refused(f"{_KEY}tokens are {len(found)}, {len(set(found))} of them apart")
    told: dict[str, Any] = {"tokenizer_type": kind, "tokens": found}
    for name in ("scores", "token_type"):
        if f"{_KEY}{name}" in keys:
            told[name] = keys.numbers(f"{_KEY}{name}")
            if len(told[name]) != len(found):
                raise keys.header.refused(
                    f"{_KEY}{name} has {len(told[name])} entries for {len(found)} tokens"
                )
    if f"{_KEY}merges" in keys:
        told["merges"] = _merges(keys, set(found))
    elif kind == _BYTES or "scores" not in told:
        raise keys.header.refused(f"it has no {_KEY}{'merges' if kind == _BYTES else 'scores'}")
    told["pre_tokenizer_type"] = _pre(keys, kind)
    return told


def _merges(keys: Keys, known: Set[str]) -> list[str]:
    found = keys.texts(f"{_KEY}merges")
    for merge in found:
        parts = merge.split(" ")
        if len(parts) != 2 or not known >= {*parts, "".join(parts)}:
            raise keys.header.refused(f"{_KEY}merges has {merge!r:.60}, which makes no token")
    return found


def _pre(keys: Keys, kind: str) -> str:
    name = keys.text(f"{_KEY}pre", "")
    if kind == _PIECES:
        return ""  # llama.cpp does not look at it
    if name not in (*GGUF_PRE_TOKENIZER_SPLITS, *_DIGITS, *_PLAIN, *_AS_QWEN2):
        raise keys.header.refused(
            f"{_KEY}pre is {name}, which is not known here: give the model's Hugging Face folder"
        )
    return "qwen2" if name in _AS_QWEN2 else name


def _odd(vocabulary: Mapping[str, Any]) -> dict[int, str]:
    """Marks of a byte-level vocabulary that hold other letters (DeepSeek's) or blanks, with what
    stands in for them: transformers would spell them in bytes, and cut them apart."""
    if vocabulary["tokenizer_type"] != _BYTES:
        return {}
    letters = set(bytes_to_unicode().values())
    kinds = enumerate(vocabulary.get("token_type", ()))
    marks = [number for number, kind in kinds if kind in _MARKS]
    words = vocabulary["tokens"]
    return {n: f"<stands-in-for-{n}>" for n in marks if not set(words[n]) <= letters}


def _own(backend: Tokenizer, vocabulary: Mapping[str, Any], odd: Mapping[int, str]) -> Tokenizer:
    """With the `odd` marks themselves, and without those that its class brought along, which would
    stand beyond the vocabulary."""
    words = vocabulary["tokens"]
    if not odd and backend.get_vocab_size() == len(words):
        return backend
    told = json.loads(backend.to_str())
    for number, word in odd.items():
        del told["model"]["vocab"][word]
        told["model"]["vocab"][words[number]] = number
    told["added_tokens"] = [
        {**token, "content": words[token["id"]]} if token["id"] in odd else token
        for token in told["added_tokens"]
        if token["id"] < len(words)
    ]
    return Tokenizer.from_str(json.dumps(told))


def _split(keys: Keys, backend: Tokenizer) -> None:
    if keys.text(f"{_KEY}model") != _BYTES:
        return
    name = keys.text(f"{_KEY}pre", "")
    if name in _DIGITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    if name in _WHOLE:
        backend.model.ignore_merges = True


def _prefix(keys: Keys, backend: Tokenizer) -> None:
    """Whether a text begins as if a space stood before it."""
    builds = isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace) or isinstance(
        backend.normalizer, normalizers.Sequence
    )
    wanted = keys.flag(f"{_KEY}add_space_prefix", builds)
    if wanted == builds:
        return
    if wanted:
        raise keys.header.refused(f"{_KEY}add_space_prefix is true, which its tokenizer cannot do")
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.pre_tokenizer = None
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )


def _special(keys: Keys, vocabulary: Mapping[str, Any]) -> dict[str, str | None]:
    keys.pass_over(*(f"{_KEY}{name}_token_id" for name in _UNUSED))
    ids = {token: token_id(keys, name) for token, name in _IDS.items()}
    return {t: None if i is None else vocabulary["tokens"][i] for t, i in ids.items()}


def _around(keys: Keys) -> dict[str, bool]:
    """Whether BOS and EOS are put around a text."""
    if keys.flag(f"{_KEY}add_sep_token", default=False):
        raise keys.header.refused(f"{_KEY}add_sep_token is true: no decoder does that")
    if keys.flag(f"{_KEY}remove_extra_whitespaces", default=False):
        raise keys.header.refused(f"{_KEY}remove_extra_whitespaces is true")
    first = keys.text(f"{_KEY}model") == _PIECES or keys.text(f"{_KEY}pre", "") in _WHOLE
    around = {
        "bos": keys.flag(f"{_KEY}add_bos_token", first and token_id(keys, "bos") is not None),
        "eos": keys.flag(f"{_KEY}add_eos_token", default=False),
    }
    for name, wanted in around.items():
        if wanted and token_id(keys, name) is None:
            raise keys.header.refused(f"{_KEY}add_{name}_token is true, and no {name} is named")
    return {f"add_{name}_token": wanted for name, wanted in around.items()}


def _templates(keys: Keys) -> str | dict[str, str] | None:
    found = {}
    if _TEMPLATE in keys:
        found["default"] = keys.text(_TEMPLATE)
    names = keys.texts("tokenizer.chat_templates") if "tokenizer.chat_templates" in keys else []
    found |= {name: keys.text(f"{_TEMPLATE}.{name}") for name in names}
    return found.get("default") if len(found) < 2 and "default" in found else found or None


def _check(keys: Keys, made: PreTrainedTokenizerBase, vocabulary: Mapping[str, Any]) -> None:
    """What the written files do against what the file says."""
    count = len(vocabulary["tokens"])
    if len(made) != count:
        raise keys.header.refused(f"its tokenizer comes out with {len(made)} tokens of {count}")
    ids, around = tokens.of_text("a", made), _around(keys)
    inner = made.encode("a", add_special_tokens=False)
    expected = [made.bos_token_id] * around["add_bos_token"] + inner
    expected += [made.eos_token_id] * around["add_eos_token"]
    if ids != expected:
        raise keys.header.refused(f"its tokenizer gives {ids} where its keys mean {expected}")
