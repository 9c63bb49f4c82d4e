"""`quant.textfile`: UTF-8 is read, with a mark or without; what is no text is named."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import zipfile
from pathlib import Path

import pytest

from quant import textfile
from quant.errors import CalibrationError

LINE = '{"text": "ä fox"}'


def zipped() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("lines.jsonl", LINE)
    return made.getvalue()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_mark_is_no_part_of_the_text(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(LINE.encode(encoding))
    assert textfile.read(tmp_path / "f") == LINE.encode()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (LINE.encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        (LINE.encode("utf-32"), "is UTF-32 text; save it as UTF-8"),
        (LINE.encode("utf-16-le"), "is UTF-16 or UTF-32 text; save it as UTF-8"),
        (LINE.encode("utf-16-be"), "is UTF-16 or UTF-32 text; save it as UTF-8"),
        (LINE.encode("utf-32-be"), "is UTF-16 or UTF-32 text; save it as UTF-8"),
        (gzip.compress(LINE.encode()), "is compressed by gzip; unpack it first"),
        (zipped(), "is a zip archive; unpack it first"),
        (b"PAR1...", "is a Parquet file; write its rows as JSON lines first"),
        (bz2.compress(LINE.encode()), "is compressed by bzip2; unpack it first"),
        (lzma.compress(LINE.encode()), "is compressed by xz; unpack it first"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n",
            "is a Git LFS pointer; run `git lfs pull` in its folder",
        ),
    ],
    ids=[
        *("utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-be"),
        *("gzip", "zip", "parquet", "bzip2", "xz", "pointer"),
    ],
)
def test_what_is_no_text_is_named(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(CalibrationError) as caught:
        textfile.read(tmp_path / "f")
    assert str(caught.value) == f"{tmp_path / 'f'} {says}"


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_has_no_end_is_not_read(kind: str, tmp_path: Path) -> None:
    if kind == "pipe":
        os.mkfifo(tmp_path / "f")
    else:
        (tmp_path / "f").symlink_to("/dev/zero")
    for look in (textfile.check, textfile.read):
        with pytest.raises(CalibrationError, match="is a pipe or a device; write its content to a"):
            look(tmp_path / "f")


def test_an_empty_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"")
    assert textfile.read(tmp_path / "f") == b""


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="cannot be read: Is a directory"):
        textfile.read(tmp_path)
