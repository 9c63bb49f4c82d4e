"""Bases made over: `quantize` reads what was trained where an adapter changes the model's kind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from quant.intake import remodel, source
from quant.intake.source import Source
from quant.lora import adapter as lora
from tests import tiny, variants

KINDS: dict[str, dict[str, Any]] = {
    "embedding": {"targets": ("embed_tokens", "q_proj")},
    "head": {"targets": ("lm_head", "q_proj")},
    "saved-embedding": {"modules_to_save": ["embed_tokens"]},
    "grown": {"vocabulary": 330},
    "grown-and-saved": {"vocabulary": 330, "modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with variants.one_thread():
        yield


def computed(opened: Source) -> Tensor:
    """Logits of what `quantize` would read, loaded into the architecture it would build."""
    model = AutoModelForCausalLM.from_config(opened.config).float()
    stored = {name: opened.tensors.get(name) for name in opened.tensors.names()}
    missing, unexpected = model.load_state_dict(stored, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return variants.logits(model)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", KINDS)
def test_what_is_read_computes_what_was_trained(tmp_path: Path, name: str, *, tied: bool) -> None:
    base = variants.base_folder(tmp_path / "base", tied=tied)
    folder, theirs = variants.trained(tmp_path / "lora", base, **KINDS[name])
    opened = source.open(str(base), adapters=[folder], cache=tmp_path / "cache")
    torch.testing.assert_close(computed(opened), theirs, rtol=1e-4, atol=2e-5)
    assert opened.fingerprint == source.open(str(base)).fingerprint
    assert (opened.folder != base) == (name.startswith("grown") or tied)


def test_a_grown_vocabulary_brings_its_tokenizer(tmp_path: Path) -> None:
    base = variants.base_folder(tmp_path / "base", layers=1)
    folder, _ = variants.trained(tmp_path / "lora", base, vocabulary=330)
    tiny.tokenizer(folder, chat=False)
    opened = source.open(str(base), adapters=[folder], cache=tmp_path / "cache")
    config = json.loads((opened.folder / "config.json").read_text())
    assert config["vocab_size"] == opened.config.vocab_size == 330
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (opened.folder / name).read_bytes() == (folder / name).read_bytes()


def test_new_tokens_come_along_where_the_embedding_has_rows_for_them(tmp_path: Path) -> None:
    base = variants.base_folder(tmp_path / "base", layers=1)
    folder = tiny.adapter_folder(tmp_path / "lora", base)
    theirs = tiny.tokenizer(folder)
    theirs.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    theirs.save_pretrained(folder)
    adapters = [lora.read_trained(folder)]
    for rows, comes in ((321, True), (320, False)):
        target = tmp_path / str(rows)
        target.mkdir()
        remodel.copy_voice(adapters, rows, target)
        assert (target / "tokenizer.json").is_file() == comes
        assert (target / "chat_template.jinja").read_text() == tiny.CHAT_TEMPLATE
