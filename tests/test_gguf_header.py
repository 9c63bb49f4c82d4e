"""A GGUF file's header is believed only as far as the file goes; what is damaged is one line."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter

from quant.errors import SourceError
from quant.intake import gguf, gguf_header
from tests import tiny, tiny_gguf

START = b"GGUF" + struct.pack("<I", 3)
HUGE = (1 << 60, (1 << 64) - 1)


def named(name: str) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return START + struct.pack("<QQ", 0, 1) + named(name) + struct.pack("<I", kind) + value


def of_tensor(dims: tuple[int, ...], kind: int = 0, offset: int = 0, name: str = "w") -> bytes:
    count = struct.pack("<QQ", 1, 0) + named(name) + struct.pack("<I", len(dims))
    return START + count + struct.pack(f"<{len(dims)}QIQ", *dims, kind, offset) + bytes(4096)


DAMAGED = {
    "empty": b"",
    "another format": b"PK\x03\x04" + bytes(64),
    "of version 1": b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
    "of the other byte order": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    **{f"{n:x} tensors": START + struct.pack("<QQ", n, 0) + bytes(64) for n in HUGE},
    **{f"{n:x} keys": START + struct.pack("<QQ", 0, n) + bytes(64) for n in HUGE},
    **{f"a name of {n:x}": START + struct.pack("<QQQ", 0, 1, n) for n in (*HUGE, 1 << 32)},
    **{f"a text of {n:x}": key("a", 8, struct.pack("<Q", n)) for n in (*HUGE, 1 << 32)},
    **{f"{n:x} numbers": key("a", 9, struct.pack("<IQ", 4, n)) for n in (*HUGE, 1 << 20)},
    **{f"{n:x} texts": key("a", 9, struct.pack("<IQ", 8, n)) for n in (*HUGE, 1 << 20)},
    "arrays in arrays": key("a", 9, struct.pack("<IQ", 9, 1)),
    "an unknown kind": key("a", 77, bytes(8)),
    "no UTF-8": key("a", 8, struct.pack("<Q", 2) + b"\xff\xff"),
    "an odd alignment": key("general.alignment", 4, struct.pack("<I", 0)),
    "too many dimensions": of_tensor((1,) * 5),
    "no dimensions": of_tensor(()),
    "a dimension of none": of_tensor((4, 0)),
    "dimensions that overflow": of_tensor((1 << 40, 1 << 40)),
    "an unknown type": of_tensor((4, 4), kind=9999),
    "half a block": of_tensor((33, 4), kind=8),
    "an offset beyond": of_tensor((4, 4), offset=1 << 62),
    "a name of control marks": key("\x1b[2J\n" * 20, 77, bytes(8)),
    "a key twice": START + struct.pack("<QQ", 0, 2) + 2 * (named("a") + struct.pack("<IB", 0, 1)),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_damaged_is_one_line(case: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(DAMAGED[case])
    with pytest.raises(SourceError, match=f"^{path} cannot be read as a GGUF model: .") as told:
        gguf_header.read(path)
    assert len(str(told.value)) < 600 and str(told.value).isprintable()


def test_tensors_that_overlap_are_refused(tmp_path: Path) -> None:
    two = b"".join(named(n) + struct.pack("<IQIQ", 1, 64, 0, 0) for n in ("a", "b"))
    path = tmp_path / "model.gguf"
    path.write_bytes(START + struct.pack("<QQ", 2, 0) + two + bytes(4096))
    with pytest.raises(SourceError, match="b overlaps"):
        gguf_header.read(path)


def test_a_whole_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_uint32("general.alignment", 64)
    writer.data_alignment = 64
    writer.add_array("some.texts", ["a", "bé"])
    writer.add_array("some.numbers", [1.5, -2.0])
    writer.add_bool("some.flag", val=True)
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    writer.add_tensor("first", np.ones(5, np.float16))
    writer.add_tensor("second", values)
    header = gguf_header.read(tiny_gguf.finish(writer))
    assert header.metadata["some.texts"] == ["a", "bé"]
    assert header.metadata["some.numbers"] == [1.5, -2.0] and header.metadata["some.flag"] is True
    place = header.tensors["second"]
    assert place.shape == (3, 4) and place.kind == GGMLQuantizationType.F32
    with header.path.open("rb") as file:
        file.seek(place.begin)
        assert file.read(place.size) == values.tobytes()


def test_no_damage_to_a_header_is_a_traceback(tmp_path: Path) -> None:
    """Bytes of a real header are replaced by chance: it is refused in one line, or still means a
    model."""
    tiny.tokenizer(tmp_path)
    path = tiny_gguf.write(tmp_path / "model.gguf", tiny.model("llama"), tmp_path)
    whole = path.read_bytes()
    end = gguf_header.read(path).tensors["token_embd.weight"].begin
    chance, refused = random.Random(0), 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 1, 8))):
            damaged[chance.randrange(end)] = chance.choice((0, 1, 255, chance.randrange(256)))
        path.write_bytes(damaged)
        try:
            gguf.model(path)
        except SourceError as told:
            refused += 1
            assert "\n" not in str(told)
    assert refused > 20
