"""`quant.shards`: the files that safetensors would write, whole or not there, joined or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant import artifact, shards
from quant.errors import SpaceError
from quant.headers import read_headers
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


def parts(folder: Path, count: int = 3) -> dict[Path, int]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"part-{place}" for place in range(count)]
    return {path: shards.write(path, some(place)) for place, path in enumerate(paths)}


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


def test_joined_parts_are_the_file_that_holds_all(tmp_path: Path) -> None:
    total = shards.assemble(parts(tmp_path / "state"), tmp_path)
    everything = some(0) | some(1) | some(2)
    assert total == shards.write(tmp_path / "whole", everything)
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "whole").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"state", "model.safetensors", "whole"}
    assert not list((tmp_path / "state").iterdir()), "parts that are joined take room"


def test_parts_are_grouped_into_indexed_shards(tmp_path: Path) -> None:
    given = parts(tmp_path / "state", count=5)
    limit = 2 * max(given.values())
    total = shards.assemble(given, tmp_path, limit)
    names = [f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.glob("model-*")) == names
    index = json.loads((tmp_path / artifact.INDEX).read_text())
    assert index["metadata"]["total_size"] == total
    for name in names:
        held = read_headers(tmp_path / name)
        assert {index["weight_map"][tensor] for tensor in held} == {name}
        assert sum(header.end - header.begin for header in held.values()) <= limit
    assert artifact.headers(tmp_path).keys() == {n for seed in range(5) for n in some(seed)}
    folded = tmp_path / "folded"
    folded.mkdir()
    shards.write(folded / "model.safetensors", {n: t for k in range(5) for n, t in some(k).items()})
    assert artifact.weights_fingerprint(folded) == artifact.weights_fingerprint(tmp_path)


@pytest.mark.parametrize("cut", range(4))
def test_an_assembly_that_was_cut_short_is_gone_on_with(cut: int, tmp_path: Path) -> None:
    """Some shards stand, and the parts of the first are gone, or not all of them."""
    expected = parts(tmp_path / "a", count=6)
    shards.assemble(expected, tmp_path, limit := 2 * max(expected.values()))
    whole = {path.name: path.read_bytes() for path in tmp_path.glob("model*")}
    again = tmp_path / "again"
    given = parts(again, count=6)
    stand = sorted(name for name in whole if name.endswith("safetensors"))[:cut]
    for name in stand:
        (again / name).write_bytes(whole[name])
    for path in list(given)[: max(0, 2 * cut - 1)]:
        path.unlink()
    assert shards.assemble(given, again, limit) == sum(expected.values())
    assert {path.name: path.read_bytes() for path in again.glob("model*")} == whole


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
