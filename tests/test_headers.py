"""Safetensors headers: read as the library wrote them, and believed only when the sizes agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from quant.errors import ArtifactError
from quant.headers import read_headers


def write_raw(path: Path, header: Any, data: bytes) -> Path:
    """A file with this header, true or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, *, dtype: str = "F32", shape: tuple[int, ...] = (2,)) -> Any:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    tensors = {
        "b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "a": torch.tensor(7.0, dtype=torch.float64),
        "codes": torch.arange(4, dtype=torch.int32),
        "none": torch.empty(0, 5, dtype=torch.float16),
    }
    save_file(tensors, tmp_path / "good.safetensors", metadata={"format": "pt"})
    return tmp_path / "good.safetensors"


def test_every_tensor_is_found_where_it_lies(good: Path) -> None:
    raw = good.read_bytes()
    found = read_headers(good)
    with safe_open(good, framework="pt") as file:
        assert set(found) == set(file.keys())
        for name, header in found.items():
            tensor = file.get_tensor(name)
            assert header.shape == tuple(tensor.shape)
            assert header.file == "good.safetensors"
            stored = raw[header.begin : header.end]
            assert stored == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert found["b"].dtype == "BF16"


def test_tensors_come_in_the_order_of_the_file(good: Path) -> None:
    places = [header.begin for header in read_headers(good).values()]
    assert places == sorted(places)


def test_a_file_without_tensors_is_an_empty_table(tmp_path: Path) -> None:
    assert read_headers(write_raw(tmp_path / "x.safetensors", {}, b"")) == {}


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"gone\.safetensors cannot be read: No such file"):
        read_headers(tmp_path / "gone.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 8, 40, -1])
def test_a_truncated_file_is_refused(good: Path, kept: int) -> None:
    good.write_bytes(good.read_bytes()[:kept])
    with pytest.raises(ArtifactError, match=r"good\.safetensors is truncated"):
        read_headers(good)


def test_bytes_after_the_last_tensor_are_refused(good: Path) -> None:
    size = good.stat().st_size
    good.write_bytes(good.read_bytes() + b"!")
    with pytest.raises(ArtifactError, match=f"is corrupt: {size + 1} bytes, .* says {size}$"):
        read_headers(good)


def test_a_header_that_claims_to_be_enormous_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(ArtifactError, match=f"not safetensors .header of {1 << 62}"):
        read_headers(path)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"\xff\xfe",
        b"[1, 2]",
        b'"text"',
        b"[" * 100_000,
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": {**entry(0, 8), "extra": 1}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}},
        {"a": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8.5]}},
    ],
    ids=["text", "bytes", "list", "string", "deep", "lacks", "extra", "short", "shape", "float"],
)
def test_a_header_that_is_no_tensor_table_is_refused(tmp_path: Path, header: Any) -> None:
    path = write_raw(tmp_path / "x.safetensors", header, bytes(8))
    with pytest.raises(ArtifactError, match=r"x\.safetensors is corrupt: .* not a tensor table"):
        read_headers(path)


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12),
        ({"a": entry(0, 8), "b": entry(12, 20)}, 20),
        ({"b": entry(8, 0)}, 8),
        ({"b": entry(-8, 0)}, 8),
        ({"b": entry(0, 8, shape=(-1, -2))}, 8),
    ],
    ids=["overlap", "hole", "backwards", "before", "negative"],
)
def test_tensors_that_do_not_tile_the_file_are_refused(
    tmp_path: Path, header: Any, size: int
) -> None:
    path = write_raw(tmp_path / "x.safetensors", header, bytes(size))
    with pytest.raises(ArtifactError, match=r"is corrupt: b lies at -?\d+, expected \d+"):
        read_headers(path)


@pytest.mark.parametrize(("dtype", "shape"), [("F32", (3,)), ("BF16", (2,)), ("F99", (2,))])
def test_a_size_that_its_type_does_not_have_is_refused(
    tmp_path: Path, dtype: str, shape: tuple[int, ...]
) -> None:
    header = {"a": entry(0, 8, dtype=dtype, shape=shape)}
    path = write_raw(tmp_path / "x.safetensors", header, bytes(8))
    with pytest.raises(ArtifactError, match=rf"corrupt: a is {dtype} \[{shape[0]}\] in 8 bytes"):
        read_headers(path)


def test_four_bit_types_are_measured_in_bits(tmp_path: Path) -> None:
    header = {"a": entry(0, 8, dtype="F4", shape=(4, 4))}
    found = read_headers(write_raw(tmp_path / "x.safetensors", header, bytes(8)))
    assert found["a"].shape == (4, 4)


def test_sizes_of_thousands_of_digits_are_refused_before_they_are_multiplied(
    tmp_path: Path,
) -> None:
    """Their product takes many seconds, and holds the interpreter's lock for all of it."""
    numbers = ",".join(["9" * 4000] * 150)
    header = f'{{"a":{{"dtype":"F32","shape":[{numbers}],"data_offsets":[0,4]}}}}'.encode()
    path = write_raw(tmp_path / "x.safetensors", header, bytes(4))
    with pytest.raises(ArtifactError, match="not a tensor table"):
        read_headers(path)


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(0, 4, shape=(1,) * 17)},
        {"a": entry(0, 4, shape=(1 << 63, 0))},
        {"a": {**entry(0, 4), "data_offsets": [0, 10**19]}},
        {"a": entry(0, 4, shape=(10**90,) * 9)},
        {"a" * 2000: entry(0, 4, shape=(1,))},
        {"a": entry(0, 4, shape=(1,), dtype="F" * 1000)},
        {"__metadata__": {"format": 1}, "a": entry(0, 4, shape=(1,))},
        {"__metadata__": ["x"], "a": entry(0, 4, shape=(1,))},
        b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    ],
    ids=["dimensions", "size", "offset", "product", "name", "dtype", "metadata", "list", "twice"],
)
def test_every_number_and_name_is_bounded(tmp_path: Path, header: Any) -> None:
    path = write_raw(tmp_path / "x.safetensors", header, bytes(4))
    with pytest.raises(ArtifactError, match="not a tensor table"):
        read_headers(path)


def test_a_reader_may_bound_the_header(good: Path) -> None:
    length = int.from_bytes(good.read_bytes()[:8], "little")
    assert read_headers(good, length)
    with pytest.raises(ArtifactError, match=f"has a header of {length} bytes, at most 16"):
        read_headers(good, 16)
