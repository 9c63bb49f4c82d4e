"""The one list of files that travel with a model: what is on it, and who goes by it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils._paths import filter_repo_objects
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from quant import artifact, checkpoint, companions
from quant.intake import remodel, source
from quant.lora import adapter
from tests import tiny

TOOLS = "{{ tools }}" + tiny.CHAT_TEMPLATE
BESIDE = f"{companions.TEMPLATES}/tool_use.jinja"
TRAVEL = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt",
    "qwen.tiktoken", "tekken.json", "tokenizer.model.v3", "chat_template.json", BESIDE,
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "generation_config.json", "LICENSE", "LICENSE.txt", "License.md", "LICENCE", "NOTICE",
    "Notice.txt", "COPYING", "USE_POLICY.md", "THIRD_PARTY_NOTICES.txt", "LICENSES/MIT.txt",
)  # fmt: skip
STAY = (
    "config.json", "model.safetensors", artifact.INDEX, artifact.MANIFEST, "quantize_config.json",
    "trainer_state.json", "training_args.json", "training_args.bin", "all_results.json",
    "wandb.json", "wandb-metadata.json", "wandb/run.json", "optimizer.pt", "scheduler.pt",
    "rng_state.pth", "pytorch_model.bin", "pytorch_model.bin.index.json", "global_step1/x.pt",
    "adapter_config.json", "train.py", "tokenization_qwen.py", "README.md", "license.safetensors",
    ".hidden.model", "runs/tokenizer.json", "original/params.json", "params.json",
)  # fmt: skip


def written(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def held(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def several(folder: Path) -> PreTrainedTokenizerBase:
    """A tokenizer with two templates, as transformers saves it."""
    made = tiny.tokenizer(folder)
    made.chat_template = {"default": tiny.CHAT_TEMPLATE, "tool_use": TOOLS}
    made.save_pretrained(folder)
    return made


def test_what_belongs_to_a_model_travels_and_a_run_stays(tmp_path: Path) -> None:
    parent, out = written(tmp_path / "parent", TRAVEL + STAY), tmp_path / "out"
    (parent / "folder.model").mkdir()
    out.mkdir()
    checkpoint.copy_companions(parent, out)
    assert held(out) == {name: name for name in TRAVEL}
    assert companions.found(parent) == sorted(TRAVEL)


def test_the_hub_is_asked_for_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By huggingface_hub's own reading of the patterns."""
    asked: dict[str, Any] = {}

    def download(_spec: str, **given: Any) -> str:
        asked.update(given)
        return str(tiny.model_folder(tmp_path / "model"))

    monkeypatch.setattr(source, "snapshot_download", download)
    source.open("owner/name")
    needed = {*TRAVEL, "config.json", "model-00001-of-00002.safetensors", artifact.INDEX}
    assert needed <= set(filter_repo_objects(needed | set(STAY), **asked))
    stay = {"trainer_state.json", "optimizer.pt", "wandb.json", "pytorch_model.bin"}
    assert not stay & set(filter_repo_objects(STAY, **asked))


def test_every_template_of_a_tokenizer_is_kept(tmp_path: Path) -> None:
    parent, out = tmp_path / "parent", tmp_path / "out"
    out.mkdir()
    theirs = several(parent)
    checkpoint.copy_companions(parent, out)
    ours = AutoTokenizer.from_pretrained(out)
    assert ours.chat_template == theirs.chat_template
    asked: dict[str, Any] = {"tools": [{"name": "look"}], "tokenize": False}
    chat = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(chat, **asked) == theirs.apply_chat_template(chat, **asked)


@pytest.mark.parametrize("name", [BESIDE, "vocab.txt", "qwen.tiktoken", "chat_template.json"])
def test_every_file_of_a_tokenizer_is_part_of_its_fingerprint(tmp_path: Path, name: str) -> None:
    several(tmp_path)
    found = {artifact.tokenizer_fingerprint(tmp_path)}
    for text in ("one", "another"):
        (tmp_path / name).write_text(text)
        found.add(artifact.tokenizer_fingerprint(tmp_path))
    assert len(found) == 3


def test_fingerprints_of_before_hold(tmp_path: Path) -> None:
    """Manifests and adapters carry them: so it was taken when eight files were known."""
    names = ("added_tokens.json", "chat_template.jinja", "merges.txt", "special_tokens_map.json",
             "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
             "vocab.json")  # fmt: skip
    written(tmp_path, (*names, "config.json", "generation_config.json", "LICENSE"))
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name}\n{hashlib.sha256(name.encode()).hexdigest()}\n".encode())
    assert artifact.tokenizer_fingerprint(tmp_path) == digest.hexdigest()


def test_a_set_of_templates_replaces_a_set(tmp_path: Path) -> None:
    base, brought, out = (tmp_path / name for name in ("base", "brought", "out"))
    out.mkdir()
    several(base)
    tiny.tokenizer(brought)
    checkpoint.copy_companions(base, out)
    companions.copy(brought, out, companions.TOKENIZER)
    assert AutoTokenizer.from_pretrained(out).chat_template == tiny.CHAT_TEMPLATE


def test_a_folder_made_over_for_its_vocabulary_has_them_all(tmp_path: Path) -> None:
    parent = tiny.model_folder(tmp_path / "parent")
    several(parent)
    tiny.edit_json(parent / "config.json", vocab_size=tiny.VOCAB - 8)
    opened = source.open(str(parent), cache=tmp_path / "cache")
    assert opened.folder != parent
    assert companions.found(opened.folder) == companions.found(parent)
    assert opened.fingerprint.tokenizer == artifact.tokenizer_fingerprint(parent)


def test_a_trainers_checkpoint_keeps_them_and_nothing_of_the_run(tmp_path: Path) -> None:
    run = tiny.model_folder(tmp_path / "run")
    several(run)
    torch.save(load_file(run / "model.safetensors"), run / "pytorch_model.bin")
    (run / "model.safetensors").unlink()
    written(run, ("LICENSE", "preprocessor_config.json", "vocab.txt", "trainer_state.json"))
    (run / "preprocessor_config.json").write_text("{}")  # a model's settings are read
    opened = source.open(str(run), cache=tmp_path / "cache")
    assert companions.found(opened.folder) == companions.found(run)
    assert {BESIDE, "LICENSE", "preprocessor_config.json"} <= set(companions.found(run))
    assert {path.name for path in opened.folder.iterdir()}.isdisjoint(STAY[3:])


def test_an_adapter_speaks_with_its_template_for_tools(tmp_path: Path) -> None:
    """Beside its base, and in a model that it is merged into."""
    base = tiny.model_folder(tmp_path / "base")
    lora = tiny.adapter_folder(tmp_path / "lora", base)
    digests = set()
    for name, save, for_tools in (("one", tiny.tokenizer, tiny.CHAT_TEMPLATE),
                                  ("two", several, TOOLS)):  # fmt: skip
        tokenizer, merged = save(lora), tmp_path / name
        found = adapter.read(lora)
        assert found.voice.template(tools=True) == for_tools
        assert found.voice.template(tools=False) == tiny.CHAT_TEMPLATE
        digests.add(found.digest)
        several(merged)  # the base's own
        remodel.copy_voice([found], tiny.VOCAB, merged)
        assert AutoTokenizer.from_pretrained(merged).chat_template == tokenizer.chat_template
    assert len(digests) == 2
