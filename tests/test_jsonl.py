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


def test_an_array_is_read_as_its_records(tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text('\ufeff[{"text": "a"},\n {"text":\n "b"}]\n')
    found = [(number, line.text) for number, line in jsonl.read(tmp_path / "f.json", Line)]
    assert found == [(1, "a"), (2, "b")]
    (tmp_path / "f.json").write_text('[{"text": "a"}, {"text": 1}]')
    with pytest.raises(CalibrationError, match=r"f\.json:2: malformed line: text: Input should"):
        list(jsonl.read(tmp_path / "f.json", Line))
    (tmp_path / "f.json").write_text('[{"text": "a"},')
    with pytest.raises(CalibrationError, match=r"f\.json: malformed array: EOF"):
        list(jsonl.read(tmp_path / "f.json", Line))


def test_a_mark_before_the_first_line_is_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_text('{"text": "a"}\n{"text": "b"}', "utf-8-sig")
    assert [line.text for _, line in jsonl.read(tmp_path / "f.jsonl", Line)] == ["a", "b"]
    (tmp_path / "f.jsonl").write_text('{"text": "a"}', "utf-16")
    with pytest.raises(CalibrationError, match=r"f\.jsonl is UTF-16 text; save it as UTF-8"):
        list(jsonl.read(tmp_path / "f.jsonl", Line))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"f\.jsonl cannot be read: No such file"):
        list(jsonl.read(tmp_path / "f.jsonl", Line))
