"""`intake.unpickle`: reads what torch saves, and runs nothing of what a hostile file asks for."""

from __future__ import annotations

import argparse
import os
import pickle
import signal
import sys
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant.errors import SourceError
from quant.intake import unpickle
from quant.intake.stored import Stored
from quant.intake.unpickle import Inert
from tests.trainers import foreign

TENSORS = {
    "float32": torch.randn(3, 5),
    "bfloat16": torch.randn(7).bfloat16(),
    "float16": torch.randn(2, 2, 2).half(),
    "float64": torch.randn(1).double(),
    "int64": torch.arange(6).view(2, 3),
    "bool": torch.tensor([True, False]),
    "float8": torch.randn(4).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
    "transposed": torch.randn(3, 5).T,
    "sliced": torch.arange(20.0).view(4, 5)[1:3, 2:],
}


def nested(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


class Hostile:
    """Pickles as the call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self._call


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def refused(path: Path) -> str:
    with pytest.raises(SourceError) as caught:
        unpickle.load(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def same(stored: object, tensor: Tensor) -> bool:
    assert isinstance(stored, Stored)
    read = stored.read()
    bits = read.contiguous().view(torch.uint8) if read.dim() else read
    wanted = tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor
    return read.dtype == tensor.dtype and read.shape == tensor.shape and torch.equal(bits, wanted)


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_comes_back(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path / "t.pt", {"x": TENSORS[name]})
    assert same(unpickle.load(path)["x"], TENSORS[name])


def test_parts_of_a_flat_tensor_are_read_alone(tmp_path: Path) -> None:
    flat = torch.randn(100)
    stored = unpickle.load(saved(tmp_path / "t.pt", flat[10:]))
    assert torch.equal(stored.part(5, 30), flat[15:40])
    assert torch.equal(stored.part(3, 3), flat[:0])
    for first, last in ((-1, 3), (80, 91), (5, 4)):
        with pytest.raises(SourceError, match="no elements"):
            stored.part(first, last)


def test_containers_and_known_objects_come_back(tmp_path: Path) -> None:
    module = nn.Linear(2, 3)
    content = {
        "ordered": OrderedDict(a=1, b=[2, (3, None)]),
        "default": defaultdict(set, {"k": {1, 2}}),
        "module": module.state_dict(),
        "parameter": nn.Parameter(torch.ones(2)),
        "size": torch.Size([4, 5]),
        "dtype": torch.bfloat16,
        "args": argparse.Namespace(layers=4, dtype=torch.float16, stop=signal.SIGTERM),
        "device": torch.device("cpu"),
        "layout": torch.strided,
    }
    read = unpickle.load(saved(tmp_path / "t.pt", content))
    assert read["ordered"] == {"a": 1, "b": [2, (3, None)]}
    assert read["default"] == {"k": {1, 2}}
    assert same(read["module"]["weight"], module.weight.detach())
    assert same(read["parameter"], torch.ones(2))
    assert (read["size"], read["dtype"]) == ((4, 5), torch.bfloat16)
    assert isinstance(read["args"], Inert)
    assert (read["args"].get("layers"), read["args"].get("none", 3)) == (4, 3)
    assert read["args"].get("dtype") == torch.float16


def test_classes_of_trainers_are_stood_in_for_and_never_imported(tmp_path: Path) -> None:
    with foreign("deepspeed.runtime.fp16.loss_scaler", "LossScaler") as kind:
        path = saved(tmp_path / "t.pt", kind(3))
    read = unpickle.load(path)
    assert isinstance(read, Inert) and read.arguments == (3,)
    assert read.name == "deepspeed.runtime.fp16.loss_scaler.LossScaler"
    assert "deepspeed" not in sys.modules


def test_a_window_of_a_file_is_read_alone(tmp_path: Path) -> None:
    archive = saved(tmp_path / "t.pt", TENSORS["float32"]).read_bytes()
    path = tmp_path / "many"
    path.write_bytes(b"before!" + archive + b"after")
    assert same(unpickle.load(path, 7, len(archive)), TENSORS["float32"])
    with pytest.raises(SourceError, match="truncated"):
        unpickle.load(path, 20, len(archive))


CALLS = {
    "posix.system": (os.system, "touch {ran}"),
    "builtins.eval": (eval, "open({ran!r}, 'w')"),
    "builtins.exec": (exec, "open({ran!r}, 'w')"),
    "builtins.getattr": (getattr, os, "system"),
    "builtins.__import__": (__import__, "{ran}"),
    "torch.serialization.load": (torch.load, "{ran}"),
    "io.open": (open, "{ran}", "w"),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("bare", [False, True], ids=["archive", "bare"])
def test_a_hostile_file_is_named_and_runs_nothing(tmp_path: Path, name: str, bare: bool) -> None:  # noqa: FBT001
    ran = tmp_path / "ran"
    function, *arguments = CALLS[name]
    if function is getattr:  # a module does not pickle; any object does for being refused
        arguments = ["", "upper"]
    call = Hostile(function, *(str(a).format(ran=str(ran)) for a in arguments))
    path = tmp_path / "model.pt"
    if bare:
        path.write_bytes(pickle.dumps({"model": [call]}))
        with pytest.raises(SourceError) as caught:
            unpickle.load_bare(path)
        told = str(caught.value)
    else:
        told = refused(saved(path, {"weight": torch.ones(2), "model": call}))
    assert f"{path} asks for {name}" in told or (name == "io.open" and "asks for _io.open" in told)
    assert "nothing of it was run" in told
    assert not ran.exists()


def test_the_hostile_file_would_have_run(tmp_path: Path) -> None:
    """Else the test above proved nothing."""
    ran = tmp_path / "ran"
    path = saved(tmp_path / "t.pt", Hostile(os.system, f"touch {ran}"))
    torch.load(path, weights_only=False)
    assert ran.exists()


@pytest.mark.parametrize(
    "written",
    [
        b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.",  # a dotted name
        b"cdeepspeed_evil\nrun\n(tR.",  # a package that only begins as a known one
        b"ctorch._utils\n_rebuild_tensor_v2\n(I1\nI2\n(t(tI0\nNtR.",  # a tensor of nothing
        b"ctorch\nfloat32\n(tR.",  # a dtype called
        b"ccollections\nOrderedDict\n}X\x01\x00\x00\x00aI1\nsb.",  # attributes set on a class
        b"(I1\n",  # ends early
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # bytes that would need all memory
        b"]r\xff\xff\xff\xffh\x05.",  # an object number that would need a table of 64 GB
        b"\x82\x01.",  # an extension code
        b"",
    ],
)
def test_bytes_that_are_no_checkpoint_are_one_line(tmp_path: Path, written: bytes) -> None:
    path = tmp_path / ".metadata"
    path.write_bytes(written)
    with pytest.raises(SourceError) as caught:
        unpickle.load_bare(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_a_file_sets_outlives_it(tmp_path: Path) -> None:
    """BUILD may set attributes on whatever a name resolves to."""
    before = dict(vars(Inert)), dict(vars(unpickle.Mapped))
    path = tmp_path / "m"
    for name in (b"collections\nOrderedDict", b"argparse\nNamespace", b"torch\nSize"):
        path.write_bytes(b"c" + name + b"\nN}X\x04\x00\x00\x00loadI1\ns\x86b.")
        with pytest.raises(SourceError):
            unpickle.load_bare(path)
    assert before == (dict(vars(Inert)), dict(vars(unpickle.Mapped)))


def doubled(kind: Callable[[list[Any]], Any], levels: int) -> Any:
    """A value that holds the one before it twice, level by level."""
    value = kind([1])
    for _ in range(levels):
        value = kind([value, value])
    return value


def as_dict(parts: list[Any]) -> dict[int, Any]:
    return dict(enumerate(parts))


# Of a few hundred bytes each. Those that are hashed have as many levels as this test's own pickling
# can afford: a reader that hashes them too ends, and does not refuse.
COSTLY: dict[str, Any] = {
    "a key": {doubled(tuple, 16): 1},
    "a key of lists' pairs": OrderedDict({doubled(tuple, 16): 1}),
    "a set's element": {doubled(tuple, 16)},
    "a frozen set's element": frozenset({doubled(tuple, 16)}),
    "a long key": {tuple(range(100)): 1},
    "tuples": {"x": doubled(tuple, 60)},
    "lists": [doubled(list, 60)],
    "dictionaries": {"x": doubled(as_dict, 60)},
    "behind a stand-in": argparse.Namespace(x=doubled(tuple, 60)),
    "a deep list": [nested(200)],
    "a long integer": 1 << 3000,
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("kind", COSTLY)
def test_a_value_that_only_costs_is_refused(tmp_path: Path, kind: str, protocol: int) -> None:
    path = tmp_path / "m"
    path.write_bytes(pickle.dumps(COSTLY[kind], protocol))
    with pytest.raises(SourceError, match=r"cannot be read as a checkpoint|asks for") as caught:
        unpickle.load_bare(path)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)
    torch.save(COSTLY[kind], path, pickle_protocol=protocol)
    assert len(refused(path)) < 500


def test_a_container_that_is_copied_over_and_over_is_refused(tmp_path: Path) -> None:
    """Ten bytes a copy of ten thousand numbers."""
    path = tmp_path / "m"
    numbers = pickle.dumps([0] * 10_000, 2)[2:-1]
    for name in (b"torch\nSize", b"builtins\nset"):
        path.write_bytes(
            b"(" + numbers + b"q\x70" + (b"c" + name + b"\nh\x70\x85R") * 5_000 + b"t."
        )
        with pytest.raises(SourceError, match="copies containers over and over"):
            unpickle.load_bare(path)


def test_what_trainers_share_is_read(tmp_path: Path) -> None:
    shape, shared = torch.Size([2, 3]), {"lr": 0.1}
    content = {
        "groups": [shared] * 1000,
        "shapes": [shape] * 1000,
        ("layer", 0): nested(20),
        "seen": {1, "a", ("b", 2)},
        None: (1 << 127, -1.5),
    }
    read = unpickle.load(saved(tmp_path / "t.pt", content))
    assert read == content


@pytest.mark.parametrize(
    "shape", [(1,) * 100, (1 << 70,), ("1" * 100,)], ids=["long", "huge", "text"]
)
def test_a_tensor_of_impossible_sizes_is_refused(tmp_path: Path, shape: tuple[Any, ...]) -> None:
    path = saved(tmp_path / "t.pt", torch.ones(1))
    told = refused(rewritten(path, {"data.pkl": _of_shape(path, shape)}))
    assert "cannot be read as a checkpoint" in told and len(told) < 500


def _of_shape(path: Path, shape: tuple[Any, ...]) -> bytes:
    """The pickle of a tensor of one number, with another shape put into it."""
    with zipfile.ZipFile(path) as archive:
        raw = archive.read("t/data.pkl")
    assert raw.count(b"K\x01\x85") == 2  # the shape, then the stride
    return raw.replace(b"K\x01\x85", pickle.dumps(shape, 2)[2:-1], 1)


@pytest.mark.parametrize("cut", [1, 200, 0.5])
def test_a_truncated_file_is_named(tmp_path: Path, cut: float) -> None:
    path = saved(tmp_path / "t.pt", torch.randn(5000))
    raw = path.read_bytes()
    path.write_bytes(raw[: -int(cut)] if cut >= 1 else raw[: int(len(raw) * cut)])
    assert "truncated" in refused(path)


def test_a_file_cut_after_it_was_opened_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "t.pt", torch.randn(5000))
    stored = unpickle.load(path)
    path.write_bytes(path.read_bytes()[:8000])
    with pytest.raises(SourceError, match="is truncated"):
        stored.read()
    path.unlink()
    with pytest.raises(SourceError, match="cannot be read"):
        stored.read()
    with pytest.raises(SourceError, match="cannot be read"):
        unpickle.load(path)


def test_the_old_format_is_told_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "t.pt"
    torch.save({"x": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert "torch 1.6 or later" in refused(path)


def test_a_view_larger_than_its_storage_is_not_made(tmp_path: Path) -> None:
    stored = unpickle.load(saved(tmp_path / "t.pt", torch.ones(1).expand(1 << 40)))
    with pytest.raises(SourceError, match="repeats 1 numbers"):
        stored.read()


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [(7, (4,), (1,)), (0, (11,), (1,)), (0, (3,), (5,)), (-1, (2,), (1,)), (0, (2, 2), (1,))],
)
def test_a_view_beyond_its_storage_is_refused(
    tmp_path: Path, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    Stored(tmp_path, 0, 10, torch.float32, 6, (4,), (1,))
    with pytest.raises(SourceError, match="is corrupt: a tensor"):
        Stored(tmp_path, 0, 10, torch.float32, offset, shape, stride)


def test_a_record_that_ends_after_the_file_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "t.pt", torch.randn(50))
    raw = bytearray(path.read_bytes())
    entry = raw.rindex(b"t/data/0") - 46  # the directory's entry: its sizes stand at 20 and 24
    assert raw[entry : entry + 4] == b"PK\x01\x02"
    raw[entry + 20 : entry + 28] = b"\xff\xff\xff\x0f" * 2
    path.write_bytes(raw)
    assert "record data/0 ends after the file" in refused(path)


def rewritten(path: Path, change: dict[str, bytes], *, deflate: bool = False) -> Path:
    with zipfile.ZipFile(path) as old:
        records = {name: old.read(name) for name in old.namelist()}
    top = next(iter(records)).partition("/")[0]
    records |= {f"{top}/{name}": data for name, data in change.items()}
    kind = zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as new:
        for name, data in records.items():
            new.writestr(name, data)
    return path


def test_an_archive_that_lies_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "t.pt", torch.randn(50))
    assert "storage 0 holds 4 bytes" in refused(rewritten(path, {"data/0": b"1234"}))
    assert "big-endian" in refused(rewritten(path, {"byteorder": b"big"}))
    path = saved(tmp_path / "u.pt", torch.randn(50))
    assert "is not stored as it is" in refused(rewritten(path, {}, deflate=True))
    with zipfile.ZipFile(tmp_path / "v.pt", "w") as other:
        other.writestr("readme", "hello")
    assert "none that torch.save wrote" in refused(tmp_path / "v.pt")
