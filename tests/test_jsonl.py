"""`quant.jsonl`: lines with their numbers, and every fault with its line's."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from quant import jsonl
from quant.errors import CalibrationError


class Line(BaseModel):
    text: str


def test_blank_lines_count_and_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_text('\n{"text": "a"}\n  \r\n{"text": "b", "more": 1}')
    found = [(number, line.text) for number, line in jsonl.read(tmp_path / "f.jsonl", Line)]
    assert found == [(2, "a"), (4, "b")]


@pytest.mark.parametrize(
    ("line", "says"),
    [(b"{", "malformed line: "), (b'{"text": 1}', "text: "), (b'{"text": "\xff"}', "malformed")],
)
def test_a_malformed_line_is_named(line: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_bytes(b'{"text": "a"}\n' + line)
    with pytest.raises(CalibrationError, match=rf"f\.jsonl:2: .*{says}"):
        list(jsonl.read(tmp_path / "f.jsonl", Line))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"f\.jsonl cannot be read: No such file"):
        list(jsonl.read(tmp_path / "f.jsonl", Line))
