"""Spoiled adapter folders through the whole way in: a 4xx with the reason, and nothing changed.

By hand for each trick that is known, and by hypothesis for bytes that nobody thought of.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from serve.adapters.sources import Sources
from serve.adapters.store import Store
from serve.errors import AdapterRefused, ServeError
from tests.fakes import BASE, BY, MODULE, SHAPES, Replica, replica
from tests.lora import write_lora

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
A = f"base_model.model.{MODULE}.lora_A.weight"
B = f"base_model.model.{MODULE}.lora_B.weight"


def config(**changes: Any) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        told = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(told | changes))

    return spoil


def tensors(**changes: torch.Tensor) -> Callable[[Path], object]:
    """A and B by their letter, others by their names."""

    def spoil(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        named = {{"A": A, "B": B}.get(name, name): tensor for name, tensor in changes.items()}
        save_file(found | named, folder / WEIGHTS)

    return spoil


def raw(change: Callable[[bytes], bytes], name: str = WEIGHTS) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return spoil


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], object]:
    """Another header over the same data."""

    def spoil(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        told = json.dumps(change(json.loads(data[8 : 8 + size]))).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(told)) + told + data[8 + size :])

    return spoil


def entry(**changes: Any) -> Callable[[Path], object]:
    return header(lambda told: told | {A: told[A] | changes})


def sparse(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, 10 << 30)


def sparse_with_header(folder: Path) -> None:
    """10 GB that the header declares, and the file system does not hold."""
    told = {A: {"dtype": "F32", "shape": [4, 640 << 20], "data_offsets": [0, 10 << 30]}}
    text = json.dumps(told).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(folder / WEIGHTS, 8 + len(text) + (10 << 30))


def linked(name: str) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to("/etc/passwd")

    return spoil


def folder_for_file(name: str) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return spoil


SPOILS: dict[str, Callable[[Path], object]] = {
    "half of the weights": raw(lambda data: data[: len(data) // 2]),
    "no data at all": raw(lambda data: data[: 8 + struct.unpack("<Q", data[:8])[0]]),
    "nothing": raw(lambda _: b""),
    "seven bytes": raw(lambda data: data[:7]),
    "bytes after the end": raw(lambda data: data + b"x"),
    "not safetensors": raw(lambda data: b"\x80\x04." + data),
    "a zip": raw(lambda data: b"PK\x03\x04" + data),
    "a header of 10 GB": raw(lambda data: struct.pack("<Q", 10 << 30) + data[8:]),
    "a header of 2^63": raw(lambda data: struct.pack("<Q", 1 << 63) + data[8:]),
    "a file of 10 GB": sparse,
    "tensors of 10 GB": sparse_with_header,
    "a header that is no object": header(lambda _: [1, 2]),
    "a header that nests": raw(lambda _: struct.pack("<Q", 100_000) + b"[" * 100_000),
    "negative offsets": entry(data_offsets=[-4, 92]),
    "offsets beyond the file": entry(data_offsets=[0, 1 << 40]),
    "offsets that run backwards": entry(data_offsets=[96, 0]),
    "overlapping tensors": header(lambda told: {**told, B: told[B] | {"data_offsets": [0, 128]}}),
    "a shape that overflows": entry(shape=[1 << 40, 1 << 40]),
    "a negative shape": entry(shape=[-4, -6]),
    "a shape of words": entry(shape=["4", "6"]),
    "an unknown dtype": entry(dtype="F128"),
    "integers": tensors(A=torch.ones(4, 6, dtype=torch.int32)),
    "an empty tensor": tensors(A=torch.ones(0, 6), B=torch.ones(8, 0)),
    "another input size": tensors(A=torch.ones(4, 7)),
    "another output size": tensors(B=torch.ones(9, 4)),
    "ranks that differ": tensors(A=torch.ones(3, 6)),
    "three dimensions": tensors(A=torch.ones(1, 4, 6)),
    "NaN": tensors(A=torch.full((4, 6), torch.nan)),
    "infinity": tensors(B=torch.full((8, 4), torch.inf)),
    "half a pair": lambda folder: save_file({A: torch.ones(4, 6)}, folder / WEIGHTS),
    "no tensors": lambda folder: save_file({}, folder / WEIGHTS),
    "a module the base lacks": tensors(**{f"{A}x": torch.ones(4, 6)}),
    "a name with dots": tensors(**{"base_model.model.../../etc.lora_A.weight": torch.ones(4, 6)}),
    "a rank bomb": config(r=10**9),
    "a rank of zero": config(r=0),
    "a negative rank": config(r=-1),
    "a rank in words": config(r="eight"),
    "a rank pattern bomb": config(rank_pattern={MODULE: 10**9}),
    "a pattern that never ends": config(rank_pattern={r"([a-z_.0-9]+)+!": 4}),
    "a pattern that hardly ends": config(alpha_pattern={".*" * 12 + "!": 4}),
    "a pattern that is none": config(rank_pattern={"(": 4}),
    "alpha that is infinite": raw(
        lambda text: text.replace(b'"lora_alpha": 4', b'"lora_alpha": Infinity'), CONFIG
    ),
    "no alpha": config(lora_alpha=None),
    "no targets": config(target_modules=None),
    "a byte order mark": raw(lambda text: b"\xef\xbb\xbf" + text, CONFIG),
    "another peft type": config(peft_type="PREFIX_TUNING"),
    "a soft prompt with LoRA weights": config(peft_type="P_TUNING", num_virtual_tokens=5),
    "a soft prompt of a billion tokens": config(peft_type="P_TUNING", num_virtual_tokens=10**9),
    "a peft type that is a list": config(peft_type=["PROMPT_TUNING"]),
    "code instead of modules": config(target_modules={"__reduce__": "os.system"}),
    "a config that is a list": raw(lambda _: b"[]", CONFIG),
    "a config that is no JSON": raw(lambda _: b"{" * 10_000, CONFIG),
    "a config in another encoding": raw(lambda text: text.decode().encode("utf-16"), CONFIG),
    "a config of 20 MB": raw(lambda text: b" " * (20 << 20) + text, CONFIG),
    "no config": lambda folder: (folder / CONFIG).unlink(),
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "a pickle": lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"),
    "linked weights": linked(WEIGHTS),
    "a linked config": linked(CONFIG),
    "a folder for weights": folder_for_file(WEIGHTS),
    "a folder for a config": folder_for_file(CONFIG),
    "a lineage that is no JSON": lambda folder: (folder / "quantserve-adapter.json").write_bytes(
        b"\xff"
    ),
}


@pytest.fixture
async def one(tmp_path: Path) -> AsyncIterator[Replica]:
    made = replica(tmp_path / "one", f"sqlite:///{tmp_path}/registry.sqlite")
    await made.reconciler.start(0.01)
    yield made
    made.registry.close()


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "lora", SHAPES)


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS.keys())
async def test_a_spoiled_adapter_is_refused_and_what_serves_goes_on(
    spoil: Callable[[Path], object], one: Replica, lora: Path, tmp_path: Path
) -> None:
    await one.catalog.put("legal", str(lora), BY)
    before, kept = one.published(), sorted((tmp_path / "one" / "store").iterdir())
    bad = write_lora(tmp_path / "bad", SHAPES, seed=1)
    spoil(bad)
    with pytest.raises(ServeError) as refusal:
        await one.catalog.put("legal", str(bad), BY)
    assert 400 <= refusal.value.status < 500
    assert len(str(refusal.value)) > 10 and refusal.value.body()["error"]["param"]
    assert one.published() == before and len(one.engine.history) == 1
    assert sorted((tmp_path / "one" / "store").iterdir()) == kept
    (told, _) = await one.registry.history("legal", 5)
    assert (told["result"], told["reason"]) == ("refused", str(refusal.value))


@pytest.mark.parametrize(
    "source",
    [
        "../../etc", "/proc/self", "/dev", "/etc/passwd", "", ".", "~", "file:///etc/../etc",
        "file://%2e%2e/etc", "file:/etc", "s3:///", "s3://", "://", "\x00", "a" * 5000,
        "/" + "a/" * 3000, "https://169.254.169.254/latest", "local:///etc", "memory://x",
        "reference://x", "zip://x::file:///etc", "hf://x/y", "C:\\adapters", "\ud800",
    ],
)  # fmt: skip
async def test_a_source_that_plays_tricks_is_refused(one: Replica, source: str) -> None:
    with pytest.raises(ServeError) as refusal:
        await one.catalog.put("legal", source, BY)
    assert 400 <= refusal.value.status < 500 and one.engine.history == []


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_damage_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Bytes overwritten, cut out or put in, in either file: refused, or a valid adapter still."""
    folder = tmp_path_factory.mktemp("fuzz")
    bad = write_lora(folder / "lora", SHAPES)
    name = data.draw(st.sampled_from((CONFIG, WEIGHTS)))
    whole = (bad / name).read_bytes()
    at = data.draw(st.integers(0, len(whole)))
    cut = data.draw(st.integers(0, 16))
    (bad / name).write_bytes(whole[:at] + data.draw(st.binary(max_size=16)) + whole[at + cut :])
    store = Store(folder / "store", BASE, Sources())
    try:
        stored = store.take_in(str(bad))
    except AdapterRefused as refusal:
        assert str(refusal)
        assert list(store.root.iterdir()) == []
    else:
        assert store.find(stored.digest) == stored
