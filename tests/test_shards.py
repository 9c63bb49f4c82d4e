"""`quant.shards`: the files that safetensors would write, whole or not there, joined or not."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant import artifact, shards
from quant.artifact import FileDigest
from quant.errors import SpaceError
from quant.shards import Writer
from tests.test_checkpoint import no_file_larger_than


def some(seed: int = 0) -> dict[str, Tensor]:
    """Tensors of every kind that a checkpoint holds, of odd sizes too."""
    draw = torch.Generator().manual_seed(seed)
    return {
        f"{seed}.scales": torch.randn(3, 5, generator=draw).bfloat16(),
        f"{seed}.codes": torch.randint(-128, 128, (7, 3), generator=draw, dtype=torch.int8),
        f"{seed}.words": torch.randint(-(2**31), 2**31, (4, 2), generator=draw, dtype=torch.int32),
        f"{seed}.half": torch.randn(9, generator=draw).half(),
        f"{seed}.turned": torch.randn(6, 4, generator=draw).T,
        f"{seed}.mask": torch.randn(5, generator=draw) > 0,
        f"{seed}.one": torch.tensor(seed),
        f"{seed}.none": torch.empty(0, 4),
    }


def theirs(path: Path, tensors: dict[str, Tensor]) -> bytes:
    """What safetensors' own writer makes of them."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, path, metadata={"format": "pt"})
    return path.read_bytes()


def parts(folder: Path, count: int = 3) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"part-{place}" for place in range(count)]
    for place, path in enumerate(paths):
        shards.write(path, some(place))
    return paths


def digest(path: Path) -> FileDigest:
    raw = path.read_bytes()
    return FileDigest(sha256=hashlib.sha256(raw).hexdigest(), bytes=len(raw))


def test_a_file_is_what_safetensors_writes(tmp_path: Path) -> None:
    size = shards.write(tmp_path / "ours", some())
    held = dict(sorted(some().items()))
    read = load_file(tmp_path / "ours")
    assert read.keys() == held.keys()
    assert all(torch.equal(read[name], held[name]) for name in held)
    assert all(read[name].dtype == held[name].dtype for name in held)
    assert size == sum(tensor.nbytes for tensor in held.values())
    same = {n: t for n, t in some().items() if n not in ("0.none", "0.half")}  # order of equals
    shards.write(tmp_path / "same", same)
    assert (tmp_path / "same").read_bytes() == theirs(tmp_path / "theirs", same)


def test_a_part_knows_its_file_without_reading_it(tmp_path: Path) -> None:
    """In pieces of whatever size: one tensor is larger than what is written at a time."""
    held = some() | {"large": torch.arange(3 << 20, dtype=torch.int16)}
    made = shards.part(tmp_path / "part", held)
    assert made.file == digest(tmp_path / "part")
    assert made.tensors == sum(tensor.nbytes for tensor in held.values())


def test_joined_parts_are_the_file_that_holds_all(tmp_path: Path) -> None:
    given, file = parts(tmp_path / "state"), tmp_path / "model.safetensors"
    found = shards.join(given, file)
    shards.write(tmp_path / "whole", some(0) | some(1) | some(2))
    assert file.read_bytes() == (tmp_path / "whole").read_bytes()
    assert found == digest(file)
    assert not list((tmp_path / "state").iterdir()), "parts that are joined take room"


@pytest.mark.parametrize("gone", range(4))
def test_a_join_that_was_cut_short_is_gone_on_with(gone: int, tmp_path: Path) -> None:
    """The file stands, and some parts are gone."""
    given, file = parts(tmp_path / "state"), tmp_path / "model.safetensors"
    file.write_bytes(b"whole")
    for part in given[:gone]:
        part.unlink()
    assert shards.join(given, file) is None, "what it holds has to be read"
    assert file.read_bytes() == b"whole" and not list((tmp_path / "state").iterdir())


def test_an_index_says_where_what_is(tmp_path: Path) -> None:
    names = [shards.name(place, 3) for place in (1, 2, 3)]
    assert names[1] == "model-00002-of-00003.safetensors"
    total = sum(shards.write(tmp_path / name, some(place)) for place, name in enumerate(names))
    shards.index(tmp_path, names, total)
    content = json.loads((tmp_path / artifact.INDEX).read_text())
    assert content["metadata"]["total_size"] == total
    for place, name in enumerate(names):
        assert {n for n, file in content["weight_map"].items() if file == name} == set(some(place))
    folded = tmp_path / "folded"
    folded.mkdir()
    shards.write(folded / "model.safetensors", some(0) | some(1) | some(2))
    assert artifact.weights_fingerprint(folded) == artifact.weights_fingerprint(tmp_path)


def test_neighbours_share_a_file_while_they_fit() -> None:
    sizes = {"a": 3, "b": 4, "c": 4, "d": 9, "e": 1, "f": 0}
    assert shards.grouped(sizes, 8) == [["a", "b"], ["c"], ["d"], ["e", "f"]]
    assert shards.grouped({}, 8) == []


def test_a_writer_makes_one_file_of_little_and_indexed_shards_of_much(tmp_path: Path) -> None:
    for folder, held in (("little", 1 << 20), ("much", 100)):
        (tmp_path / folder).mkdir()
        writer = Writer(tmp_path / folder, held)
        for name in "abc":
            writer.add(name, torch.full((1000,), float(ord(name))))
        assert writer.close() == 12_000
    assert [path.name for path in (tmp_path / "little").iterdir()] == [artifact.SINGLE]
    much = {f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)} | {artifact.INDEX}
    assert {path.name for path in (tmp_path / "much").iterdir()} == much
    one, other = (artifact.weights_fingerprint(tmp_path / name) for name in ("little", "much"))
    assert one == other


def test_a_file_the_disk_cannot_hold_is_named_and_nothing_of_it_stays(tmp_path: Path) -> None:
    shards.write(tmp_path / "a", some())
    before = (tmp_path / "a").read_bytes()
    with (
        no_file_larger_than(10_000),
        pytest.raises(SpaceError, match=f"^{tmp_path} cannot hold a: File too large"),
    ):
        shards.write(tmp_path / "a", {"large": torch.ones(100_000)})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == before
