"""Taking adapters in: what is refused, with which field, and that the copy is our own."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve.adapters.sources import Sources
from serve.adapters.store import Base, Store
from serve.errors import AdapterRefused
from tests import tiny
from tests.lora import write_lora

MODULE = "model.layers.0.mlp.up_proj"
BASE = Base({MODULE: (8, 6)}, max_rank=4, weights="a" * 64)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "lora", {MODULE: (8, 6)})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", BASE, Sources())


def kept(store: Store) -> list[str]:
    return [folder.name for folder in store.root.iterdir()]


def test_the_copy_does_not_follow_the_source(lora: Path, store: Store) -> None:
    first = store.take_in(str(lora))
    before = (first.folder / "adapter_model.safetensors").read_bytes()
    write_lora(lora, {MODULE: (8, 6)}, seed=9)
    second = store.take_in(str(lora))
    assert (first.folder / "adapter_model.safetensors").read_bytes() == before
    assert second.digest != first.digest


def test_only_the_files_of_an_adapter_are_taken(lora: Path, store: Store) -> None:
    (lora / "optimizer.pt").write_bytes(b"x" * 1000)
    (lora / "adapter_model.bin").write_bytes(b"x")  # beside safetensors: left where it is
    stored = store.take_in(str(lora))
    names = {path.name for path in stored.folder.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    assert stored.bytes == sum(path.stat().st_size for path in stored.folder.iterdir())


def test_what_an_adapter_speaks_with_is_taken_in_and_found_again(
    lora: Path, store: Store, tmp_path: Path
) -> None:
    plain = store.take_in(str(lora))
    theirs = tiny.tokenizer(lora)
    (lora / "generation_config.json").write_text('{"temperature": 0.5}')
    known = theirs.get_vocab()
    speaking = Store(store.root, replace(BASE, tokens=known), Sources())
    stored = speaking.take_in(str(lora))
    assert stored.digest != plain.digest
    assert stored.voice.templates == {"default": tiny.CHAT_TEMPLATE}
    assert stored.voice.defaults == {"temperature": 0.5}
    assert stored.voice.eos == (known[tiny.END],)
    assert speaking.find(stored.digest) == stored
    assert not (stored.folder / "tokenizer.json").exists()  # its added tokens are what counts
    other = Store(store.root, replace(BASE, tokens={**known, tiny.TURN: 99}), Sources())
    with pytest.raises(AdapterRefused, match="im_start"):
        other.find(stored.digest)
    assert stored.folder.is_dir()


@pytest.mark.parametrize(
    ("name", "content", "param"),
    [
        ("chat_template.jinja", "{% if %}", "chat_template.jinja"),
        ("chat_template.jinja", "x" * (300 << 10), "chat_template.jinja"),
        ("generation_config.json", '{"temperature": -1}', "temperature"),
        ("tokenizer_config.json", '{"eos_token": "<ghost>"}', "tokenizer.json"),
        ("added_tokens.json", '{"<ghost>": 4}', "tokenizer.json"),
        ("special_tokens_map.json", "[", "special_tokens_map.json"),
    ],
)
def test_what_cannot_be_spoken_with_is_refused(
    lora: Path, tmp_path: Path, name: str, content: str, param: str
) -> None:
    (lora / name).write_text(content)
    store = Store(tmp_path / "store", replace(BASE, tokens={"<s>": 0}), Sources())
    with pytest.raises(AdapterRefused) as refusal:
        store.take_in(str(lora))
    assert refusal.value.param == param and str(lora) in str(refusal.value)
    assert kept(store) == []


def test_nothing_is_left_of_a_refused_adapter(lora: Path, store: Store) -> None:
    tensors = load_file(lora / "adapter_model.safetensors")
    name = f"base_model.model.{MODULE}.lora_A.weight"
    tensors[name][0, 0] = torch.nan
    save_file(tensors, lora / "adapter_model.safetensors")
    with pytest.raises(AdapterRefused, match="NaN") as refusal:
        store.take_in(str(lora))
    assert refusal.value.param == name
    assert kept(store) == []


def test_a_refusal_names_the_source_and_not_our_folders(lora: Path, store: Store) -> None:
    (lora / "adapter_config.json").write_text("[]")
    with pytest.raises(AdapterRefused, match=str(lora)) as refusal:
        store.take_in(str(lora))
    assert ".partial" not in str(refusal.value)


def test_a_rank_above_the_limit_is_named(tmp_path: Path, store: Store) -> None:
    wide = write_lora(tmp_path / "wide", {MODULE: (8, 6)}, rank=5)
    with pytest.raises(AdapterRefused, match="at most 4") as refusal:
        store.take_in(str(wide))
    assert refusal.value.param == "rank"


def test_lineage_decides_by_fingerprint_here_and_wherever_it_is_found_again(
    lora: Path, store: Store, tmp_path: Path
) -> None:
    def trained_on(weights: str) -> None:
        base = {"weights": weights, "tokenizer": "c" * 64}
        (lora / "quantserve-adapter.json").write_text(json.dumps({"format": 1, "base": base}))

    trained_on("b" * 64)
    with pytest.raises(AdapterRefused, match="bbbbbbbbbbbb"):
        store.take_in(str(lora))
    trained_on("a" * 64)
    stored = store.take_in(str(lora))
    other = Store(store.root, Base(BASE.shapes, 4, weights="d" * 64), Sources())
    with pytest.raises(AdapterRefused, match="aaaaaaaaaaaa"):
        other.find(stored.digest)
    assert stored.folder.is_dir()


def test_a_pickle_is_refused(lora: Path, store: Store) -> None:
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
    with pytest.raises(AdapterRefused, match="pickle"):
        store.take_in(str(lora))


def test_other_bytes_than_expected_are_refused(lora: Path, store: Store) -> None:
    stored = store.take_in(str(lora))
    assert store.take_in(str(lora), stored.digest) == stored
    with pytest.raises(AdapterRefused, match="ffffffffffff") as refusal:
        store.take_in(str(lora), "f" * 64)
    assert refusal.value.param == "digest"


def test_what_is_kept_is_found_and_what_has_rotted_is_not(lora: Path, store: Store) -> None:
    stored = store.take_in(str(lora))
    assert store.find(stored.digest) == stored
    assert store.find("f" * 64) is None
    (stored.folder / "adapter_model.safetensors").write_bytes(b"short")
    assert store.find(stored.digest) is None
    assert kept(store) == []


def test_what_was_found_is_not_read_again_until_a_file_changes(lora: Path, store: Store) -> None:
    stored = store.take_in(str(lora))
    assert store.find(stored.digest) == stored
    weights = stored.folder / "adapter_model.safetensors"
    before = weights.stat()
    with weights.open("r+b") as file:  # in place, which nobody but a test hides
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert store.find(stored.digest) == stored
    os.utime(weights)
    assert store.find(stored.digest) is None


def test_many_intakes_of_one_adapter_are_one_folder(lora: Path, store: Store) -> None:
    found: list[str] = []
    intakes = [
        threading.Thread(target=lambda: found.append(store.take_in(str(lora)).digest))
        for _ in range(6)
    ]
    for intake in intakes:
        intake.start()
    for intake in intakes:
        intake.join()
    assert len(found) == 6 and kept(store) == [found[0]]


def test_the_sweep_spares_what_is_needed_and_what_is_fresh(
    lora: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = store.take_in(str(lora))
    write_lora(lora, {MODULE: (8, 6)}, seed=9)
    second = store.take_in(str(lora))
    (store.root / ".partial-crashed").mkdir()
    assert store.sweep(set()) == []
    monkeypatch.setattr("serve.adapters.store.UNNEEDED_S", -1.0)
    assert set(store.sweep({second.digest})) == {first.digest, ".partial-crashed"}
    assert kept(store) == [second.digest]


def test_what_is_kept_is_on_the_disk_before_it_is_acknowledged(
    lora: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files, the folder that lists them, and the store that lists the folder, in this order."""
    synced: list[str] = []
    stock = os.fsync

    def fsync(place: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{place}"))
        stock(place)

    monkeypatch.setattr(os, "fsync", fsync)
    stored = store.take_in(str(lora))
    *files, staging, root = synced
    assert root == str(store.root.resolve())
    assert Path(staging).parent == store.root.resolve()
    assert {Path(file).name for file in files} == {path.name for path in stored.folder.iterdir()}
    assert {str(Path(file).parent) for file in files} == {staging}


def test_a_folder_of_another_user_is_served(
    lora: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time is not ours to set; that user's server sweeps it."""
    stored = store.take_in(str(lora))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr("serve.adapters.store.os.utime", refuse)
    assert store.find(stored.digest) == stored
    assert store.take_in(str(lora)) == stored


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("generation_config.json", '{"stop_strings": [""]}'),
        ("chat_template.jinja", "{% include 'x' %}"),
        ("adapter_config.json", '{"a": 1, "a": 2}'),
    ],
)
def test_what_an_older_release_took_in_is_refused_now_with_both_reasons(
    lora: Path, store: Store, name: str, content: str
) -> None:
    """And its source is gone, so that nothing can replace it."""
    stored = store.take_in(str(lora))
    (stored.folder / name).write_text(content)
    assert store.find(stored.digest) is None
    (lora / "adapter_config.json").unlink()
    with pytest.raises(AdapterRefused, match=r"missing.*thrown away: ") as refusal:
        store.take_in(str(lora), stored.digest)
    assert name in str(refusal.value) or "bytes have changed" in str(refusal.value)


@pytest.mark.parametrize("key", ["x" * 100_000, "\ud800", "a\0b"], ids=["long", "half", "nul"])
def test_a_refusal_can_be_told_whatever_the_file_holds(lora: Path, store: Store, key: str) -> None:
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps({**config, key: "on"}))
    with pytest.raises(AdapterRefused, match="adapter_config") as refusal:
        store.take_in(str(lora))
    told = json.dumps(refusal.value.body(), ensure_ascii=False).encode()
    assert len(told) < 4000 and b"\0" not in told and b"u0000" not in told
