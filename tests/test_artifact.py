"""The sealed folder: what the manifest vouches for, and what is read without loading a tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant import artifact, formats
from quant.artifact import INDEX, MANIFEST, SINGLE, CalibrationReport, Fingerprint, Manifest
from quant.errors import ArtifactError
from quant.formats import Format
from tests import durability, tiny
from tests.durability import Disk

FACTS = Manifest(
    created=datetime(2026, 1, 1, tzinfo=UTC),
    quantserve="0.1.0",
    architecture="LlamaForCausalLM",
    source="tests",
    parent=Fingerprint(weights="a" * 64, tokenizer="b" * 64),
    recipe={"scheme": "w4a16", "group_size": None},
    scheme="w4a16",
    bits=4,
    group_size=64,
    calibration=CalibrationReport(digest="c" * 64, origin="file", samples=2, tokens=512),
    layers=(),
    bytes_before=4000,
    bytes_after=1000,
    seconds=1.5,
    versions={"torch": "2"},
)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights twice: `single`, one file, and `sharded`, many."""
    top = tmp_path_factory.mktemp("models")
    tiny.model_folder(top / "single")
    tiny.model_folder(top / "sharded", shard="50KB")
    assert len(list((top / "sharded").glob("*.safetensors"))) > 2
    return top


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Disk]:
    yield from durability.watched(monkeypatch, tmp_path)


@pytest.fixture
def single(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models / "single", tmp_path / "single"))


@pytest.fixture
def sharded(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models / "sharded", tmp_path / "sharded"))


def plain(folder: Path, **tensors: torch.Tensor) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / SINGLE)
    return folder


def test_what_is_sealed_is_read_back(single: Path) -> None:
    sealed = artifact.seal(single, FACTS)
    assert artifact.read(single) == sealed
    assert sealed.model_copy(update={"files": {}}) == FACTS


def test_every_file_is_vouched_for_but_the_manifest(single: Path) -> None:
    (single / "extra").mkdir()
    (single / "extra" / "notes.txt").write_text("hello")
    files = artifact.seal(single, FACTS).files
    expected = {
        p.relative_to(single).as_posix(): p.stat().st_size
        for p in single.rglob("*")
        if p.is_file() and p.name != MANIFEST
    }
    assert {name: file.bytes for name, file in files.items()} == expected
    assert "extra/notes.txt" in files


def test_sealing_again_after_a_crash_holds(single: Path) -> None:
    (single / f".{MANIFEST}.partial").write_text("half a mani")
    for _ in range(2):
        sealed = artifact.seal(single, FACTS)
        artifact.verify(single, sealed)
        assert not [name for name in sealed.files if MANIFEST in name]


def test_hidden_files_are_no_part_of_an_artifact(single: Path) -> None:
    (single / ".lock").write_text("")
    sealed = artifact.seal(single, FACTS)
    assert ".lock" not in sealed.files
    (single / ".lock").unlink()
    artifact.verify(single, sealed)


def test_amending_vouches_anew_for_what_was_altered_and_for_nothing_else(single: Path) -> None:
    sealed = artifact.seal(single, FACTS)
    weights = (single / SINGLE).read_bytes()
    (single / "README.md").write_text("what it is")
    (single / SINGLE).write_bytes(weights[:-1] + b"\x99")
    amended = artifact.amend(single, sealed, ["README.md"])
    assert artifact.read(single) == amended
    assert set(amended.files) == {*sealed.files, "README.md"}
    with pytest.raises(ArtifactError, match="differs from what was sealed"):
        artifact.verify(single, amended)
    (single / SINGLE).write_bytes(weights)
    artifact.verify(single, amended)


def test_a_folder_that_is_no_artifact_has_no_manifest(single: Path) -> None:
    assert artifact.read(single) is None


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"bits": "four"}, "bits"),
        ({"format": 3}, "format"),
        ({"colour": "red"}, "colour"),
        ({"parent": {"weights": "XYZ", "tokenizer": "b" * 64}}, "parent.weights"),
        ({"scheme": None}, "scheme"),
    ],
)
def test_a_wrong_field_of_the_manifest_is_named(
    single: Path, change: dict[str, object], place: str
) -> None:
    artifact.seal(single, FACTS)
    tiny.edit_json(single / MANIFEST, **change)
    with pytest.raises(ArtifactError, match=rf"{MANIFEST} is not a valid manifest: {place}: "):
        artifact.read(single)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[]"])
def test_a_broken_manifest_is_named(single: Path, text: bytes) -> None:
    (single / MANIFEST).write_bytes(text)
    with pytest.raises(ArtifactError, match=rf"{MANIFEST} is not a valid manifest: the file: "):
        artifact.read(single)


def test_what_was_sealed_verifies(sharded: Path) -> None:
    sealed = artifact.seal(sharded, FACTS)
    assert artifact.read(sharded) == sealed
    artifact.verify(sharded, sealed)
    (sharded / "additional_chat_templates").mkdir()  # in which nothing lies
    artifact.verify(sharded, sealed)


def test_a_sealed_file_that_is_missing_is_named(single: Path) -> None:
    sealed = artifact.seal(single, FACTS)
    (single / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is missing"):
        artifact.verify(single, sealed)


def test_a_file_of_another_size_is_named(single: Path) -> None:
    sealed = artifact.seal(single, FACTS)
    with (single / "config.json").open("a") as file:
        file.write(" ")
    size = sealed.files["config.json"].bytes
    with pytest.raises(ArtifactError, match=rf"config\.json has {size + 1} .* says {size}"):
        artifact.verify(single, sealed)


def test_one_altered_byte_is_found(single: Path) -> None:
    sealed = artifact.seal(single, FACTS)
    raw = bytearray((single / SINGLE).read_bytes())
    raw[-1] ^= 1
    (single / SINGLE).write_bytes(raw)
    with pytest.raises(ArtifactError, match=r"model\.safetensors differs from what was sealed"):
        artifact.verify(single, sealed)


@pytest.mark.parametrize("tensors", [True, False])
@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize(
    "name",
    ["model-00002.safetensors", "pytorch_model.bin", "consolidated.00.pth", "adapter_config.json",
     "preprocessor_config.json", "chat_template.jinja", "tokenizer.model", "modeling_llama.py",
     "additional_chat_templates/tool_use.jinja", "original/params.json", "notes"],
)  # fmt: skip
def test_what_nobody_sealed_is_found(single: Path, name: str, *, link: bool, tensors: bool) -> None:
    (single / "chat_template.jinja").unlink()
    sealed = artifact.seal(single, FACTS)
    added = single / name
    added.parent.mkdir(exist_ok=True)
    if link:
        (single.parent / "elsewhere").write_text("x")
        added.symlink_to(single.parent / "elsewhere")
    else:
        added.write_text("x")
    with pytest.raises(ArtifactError, match=f"^{added} is not part of the sealed artifact"):
        artifact.verify(single, sealed, tensors=tensors)
    artifact.verify(single, sealed, tensors=tensors, but=[name])


def test_a_linked_folder_is_found(single: Path) -> None:
    sealed = artifact.seal(single, FACTS)
    (single.parent / "elsewhere").mkdir()
    (single.parent / "elsewhere" / "tool_use.jinja").write_text("x")
    (single / "additional_chat_templates").symlink_to(single.parent / "elsewhere")
    with pytest.raises(ArtifactError, match="additional_chat_templates is not part of"):
        artifact.verify(single, sealed)


def test_an_artifact_of_links_to_what_was_sealed_verifies(single: Path, tmp_path: Path) -> None:
    """As a hub's cache lays it out, with notes of its own."""
    sealed = artifact.seal(single, FACTS)
    cached = tmp_path / "snapshot"
    (cached / ".cache" / "huggingface").mkdir(parents=True)
    (cached / ".cache" / "huggingface" / "x.metadata").write_text("x")
    for path in single.iterdir():
        (cached / path.name).symlink_to(path)
    assert artifact.read(cached) == sealed
    artifact.verify(cached, sealed)


def test_without_tensors_all_else_is_read_and_tensors_are_held_to_their_size(single: Path) -> None:
    sealed = artifact.seal(single, FACTS)
    for name in ("config.json", "tokenizer.json", SINGLE):
        before = (single / name).read_bytes()
        (single / name).write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        if name == SINGLE:
            artifact.verify(single, sealed, tensors=False)
        with pytest.raises(ArtifactError, match=f"{name} differs from what was sealed"):
            artifact.verify(single, sealed, tensors=name == SINGLE)
        (single / name).write_bytes(before)
    with (single / SINGLE).open("ab") as file:
        file.write(b"x")
    with pytest.raises(ArtifactError, match=f"{SINGLE} has .* bytes"):
        artifact.verify(single, sealed, tensors=False)


def _keys(content: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inner = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in inner:
        yield (*at, key)
        if isinstance(value, dict | list):
            yield from _keys(value, (*at, key))


def test_no_entry_of_a_manifest_is_removed_or_edited_unseen(single: Path) -> None:
    """Each of them, at every depth, in every way that leaves a manifest that can be read."""
    files = artifact.seal(single, FACTS).files
    whole = json.loads((single / MANIFEST).read_text())
    places, ways = list(_keys(whole)), 0
    assert len(places) > 30 + len(files)
    for place in places:
        for change in ("remove", "alter"):
            content = json.loads(json.dumps(whole))
            holder = content
            for key in place[:-1]:
                holder = holder[key]
            if change == "remove":
                del holder[place[-1]]
            else:
                holder[place[-1]] = _other(holder[place[-1]])
            if content == whole:
                continue
            (single / MANIFEST).write_text(json.dumps(content))
            ways += 1
            with pytest.raises(ArtifactError, match=r"was altered after|is not a valid manifest"):
                artifact.read(single)
    assert ways > len(places)
    (single / MANIFEST).write_text(json.dumps(whole, separators=(",", ":"), sort_keys=True))
    read = artifact.read(single)
    assert read is not None and read.files == files, "how it is laid out says nothing"


def _other(value: object) -> object:
    """Of the same kind, so that only the digest tells."""
    if isinstance(value, str):
        return "f" * 64 if len(value) == 64 else f"{value}x"
    if isinstance(value, int | float):
        return value + 1
    return value


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", ".hidden"])
def test_a_manifest_vouches_for_nothing_outside(single: Path, name: str) -> None:
    (single / name).parent.mkdir(exist_ok=True)
    if not (single / name).exists():
        (single / name).write_text("x")
    sealed = artifact.seal(single, FACTS)
    wide = artifact.amend(single, sealed, [name])
    with pytest.raises(ArtifactError, match="is missing"):
        artifact.verify(single, wide)


def older(folder: Path) -> Manifest:
    """As the versions sealed whose manifests carried no digest of themselves."""
    sealed = artifact.seal(folder, FACTS)
    content = json.loads(sealed.model_copy(update={"format": 1}).model_dump_json())
    (folder / MANIFEST).write_text(json.dumps(content))
    found = artifact.read(folder)
    assert found is not None and found.files == sealed.files
    return found


def test_a_manifest_of_before_is_read_and_stays_what_it_is(single: Path) -> None:
    manifest = older(single)
    artifact.verify(single, manifest)
    (single / "README.md").write_text("measured")
    amended = artifact.amend(single, manifest, ["README.md"])
    assert artifact.read(single) == amended and amended.format == 1, "nobody vouches for it now"
    artifact.seal(single, FACTS)
    tiny.edit_json(single / MANIFEST, format=1)
    with pytest.raises(ArtifactError, match="was altered after it was sealed"):
        artifact.read(single)


def test_digests_that_are_known_are_not_taken_again(single: Path) -> None:
    expected = artifact.seal(single, FACTS).files
    told = {SINGLE: artifact.FileDigest(sha256="d" * 64, bytes=3), "gone": expected[SINGLE]}
    assert artifact.seal(single, FACTS, told).files == expected | {SINGLE: told[SINGLE]}


def test_a_manifest_is_on_the_disk_before_it_has_its_name(single: Path, disk: Disk) -> None:
    for _ in range(2):
        artifact.seal(single, FACTS)
    assert disk.named == [MANIFEST] * 2 and not disk.unsafe and not disk.unsettled


def test_shards_hold_what_one_file_holds(single: Path, sharded: Path) -> None:
    whole, split = artifact.headers(single), artifact.headers(sharded)
    assert list(whole) == list(split) == sorted(whole)
    assert [h[:2] for h in whole.values()] == [h[:2] for h in split.values()]
    assert {header.file for header in whole.values()} == {SINGLE}


def test_one_file_wins_over_an_index_as_loaders_have_it(single: Path) -> None:
    (single / INDEX).write_text('{"weight_map": {"ghost": "ghost.safetensors"}}')
    assert "ghost" not in artifact.headers(single)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=rf"{tmp_path} holds neither {SINGLE} nor {INDEX}"):
        artifact.headers(tmp_path)


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds no tensors"):
        artifact.headers(plain(tmp_path / "empty"))


def test_a_missing_shard_is_named(sharded: Path) -> None:
    lost = sorted(sharded.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ArtifactError, match=f"{lost} cannot be read: No such file"):
        artifact.headers(sharded)


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    hurt = sorted(sharded.glob("*.safetensors"))[1]
    hurt.write_bytes(hurt.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match=f"{hurt} is truncated"):
        artifact.headers(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    both = load_file(first) | load_file(second)
    save_file(both, second)
    with pytest.raises(ArtifactError, match=rf"is in {first.name} and in {second.name}"):
        artifact.headers(sharded)


def test_a_tensor_that_the_index_promises_has_to_be_there(sharded: Path) -> None:
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    shard = next(iter(weight_map.values()))
    tiny.edit_json(sharded / INDEX, weight_map={**weight_map, "ghost.weight": shard})
    with pytest.raises(ArtifactError, match=rf"{shard} lacks ghost\.weight"):
        artifact.headers(sharded)


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "x.bin", ".."]
)
def test_an_index_does_not_point_outside_its_folder(sharded: Path, shard: str) -> None:
    tiny.edit_json(sharded / INDEX, weight_map={"a": shard})
    with pytest.raises(ArtifactError, match=rf"{INDEX} points outside its folder: '{shard}'"):
        artifact.headers(sharded)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000],
    ids=["cut", "list", "empty", "map", "number", "deep"],
)
def test_a_broken_index_is_named(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    with pytest.raises(ArtifactError, match=rf"{INDEX} is not an index of tensors"):
        artifact.headers(sharded)


def test_plain_weights_have_the_shapes_that_are_stored(single: Path) -> None:
    shapes = artifact.linear_shapes(single)
    assert shapes["model.layers.1.mlp.down_proj"] == (64, 128)
    assert shapes["model.layers.0.self_attn.k_proj"] == (32, 64)
    assert not any("norm" in module for module in shapes)


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_words_are_unpacked(tmp_path: Path, bits: int) -> None:
    words = torch.zeros(64 * bits // 32, 48, dtype=torch.int32)  # [in * bits / 32, out]
    scales = torch.zeros(2, 48)
    folder = plain(tmp_path, **{"m.q_proj.qweight": words, "m.q_proj.scales": scales})
    section = {"quant_method": "gptq", "bits": bits, "group_size": 32}
    (folder / "config.json").write_text(json.dumps({"quantization_config": section}))
    assert artifact.linear_shapes(folder) == {"m.q_proj": (48, 64)}


def test_int8_weights_have_the_shapes_that_are_stored(tmp_path: Path) -> None:
    codes, scale = torch.zeros(48, 64, dtype=torch.int8), torch.zeros(48, 1)
    folder = plain(tmp_path, **{"m.q_proj.weight": codes, "m.q_proj.weight_scale": scale})
    assert artifact.linear_shapes(folder) == {"m.q_proj": (48, 64)}


def test_gptq_words_are_unpacked_by_the_bits_of_their_layer(tmp_path: Path) -> None:
    names = "m.0.up_proj.qweight", "m.1.up_proj.qweight"
    folder = plain(tmp_path, **{name: torch.zeros(8, 48, dtype=torch.int32) for name in names})
    plan = {"m.0.up_proj": Format(4, 32), "m.1.up_proj": Format(8, 32)}
    section = formats.section("w4a16", plan)
    (folder / "config.json").write_text(json.dumps({"quantization_config": section}))
    assert artifact.linear_shapes(folder) == {"m.0.up_proj": (48, 64), "m.1.up_proj": (48, 32)}


NO_BITS = {"quant_method": "gptq", "bits": "four", "group_size": 32}


@pytest.mark.parametrize("config", [{}, {"quantization_config": NO_BITS}])
def test_gptq_words_without_their_bits_are_refused(
    tmp_path: Path, config: dict[str, object]
) -> None:
    folder = plain(tmp_path, **{"m.qweight": torch.zeros(8, 48, dtype=torch.int32)})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ArtifactError, match=r"config\.json: (None None is no|m would have 'four' bits)"
    ):
        artifact.linear_shapes(folder)


def test_shards_have_the_fingerprint_of_one_file(single: Path, sharded: Path) -> None:
    assert artifact.weights_fingerprint(single) == artifact.weights_fingerprint(sharded)


def test_the_weights_fingerprint_follows_bytes_names_shapes_and_types(tmp_path: Path) -> None:
    value = torch.arange(6, dtype=torch.float16).reshape(2, 3)
    other = value.clone()
    other[1, 2] += 1
    same_bytes = {"a": value.reshape(3, 2)}, {"b": value}, {"a": value.view(torch.bfloat16)}
    prints = [
        artifact.weights_fingerprint(plain(tmp_path / str(place), **tensors))
        for place, tensors in enumerate([{"a": value}, {"a": other}, *same_bytes])
    ]
    assert len(set(prints)) == len(prints)


def test_the_tokenizer_fingerprint_follows_its_files_alone(single: Path) -> None:
    before = artifact.tokenizer_fingerprint(single)
    (single / "config.json").write_text("{}")
    assert artifact.tokenizer_fingerprint(single) == before
    tiny.edit_json(single / "tokenizer_config.json", eos_token="</s>")
    after = artifact.tokenizer_fingerprint(single)
    (single / "tokenizer_config.json").unlink()
    assert len({before, after, artifact.tokenizer_fingerprint(single)}) == 3


def test_the_quantization_config_is_the_section_or_none(single: Path) -> None:
    assert artifact.quantization_config(single) is None
    tiny.edit_json(single / "config.json", quantization_config={"quant_method": "gptq"})
    assert artifact.quantization_config(single) == {"quant_method": "gptq"}


@pytest.mark.parametrize("text", [None, "{", "[" * 100_000], ids=["none", "cut", "deep"])
def test_a_config_that_cannot_be_read_is_named(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"config\.json cannot be read as JSON"):
        artifact.quantization_config(tmp_path)


def test_a_config_that_is_no_object_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ArtifactError, match=r"config\.json is not a JSON object"):
        artifact.quantization_config(tmp_path)
