"""Foreign JSON: what any reader takes is taken, and what only costs is refused at once."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from quant import foreign_json

PLAIN = {"a": [1, -2.5, 1e-9, "text \U0001f600", None, True, {"b": []}], "c": 2**63}


def test_what_the_standard_library_reads_is_read_the_same() -> None:
    assert foreign_json.loads(json.dumps(PLAIN).encode()) == PLAIN
    assert math.isnan(foreign_json.loads(b"NaN"))
    assert foreign_json.loads(b"[Infinity, -Infinity]") == [math.inf, -math.inf]


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b'{"a": ' + b"9" * 4000 + b"}", "a number of 4000 digits"),
        (b"[1." + b"9" * 10_000_000 + b"]", "a number of 10000002 characters"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' is there twice"),
        (b"[" * 100_000, "nested deeper"),
        (b"[" * 65 + b"]" * 65, "nested deeper than 64"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "nested deeper than 64"),
        (b"{", "Expecting"),
        (b"\xff", "codec can't decode"),
        ('{"a": 1}'.encode("utf-16"), "codec can't decode"),
    ],
    ids=["digits", "fraction", "twice", "brackets", "lists", "objects", "text", "bytes", "utf-16"],
)
def test_what_only_costs_is_refused(raw: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        foreign_json.loads(raw)


def test_nesting_up_to_the_limit_is_taken() -> None:
    assert foreign_json.loads(b"[" * 64 + b"]" * 64)


def test_a_file_is_read_up_to_a_size(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'{"a": 1}')
    assert foreign_json.read(path) == {"a": 1}
    with pytest.raises(ValueError, match="longer than the 7 bytes"):
        foreign_json.read(path, most=7)


def test_all_of_the_quantizers_json_comes_through_here() -> None:
    """But what we wrote ourselves, and answers of processes and servers that we started."""
    own = {"artifact.py", "foreign_json.py", "scribe.py", "cell.py", "cell_inmate.py", "served.py",
           "gguf_tokenizer.py"}  # fmt: skip
    home = Path(foreign_json.__file__).parent
    loads = re.compile(r"(?<!foreign_)json\.loads?\(")
    files = {path.name for path in home.rglob("*.py") if loads.search(path.read_text("utf-8"))}
    assert files <= own
