"""A text file of the user's: its bytes as UTF-8, without a byte order mark.

Refuses what is no text by what it is: another encoding, an archive.
"""

from __future__ import annotations

import codecs
import stat
from pathlib import Path

from quant.errors import CalibrationError

_OTHERS = {
    codecs.BOM_UTF32_LE: "UTF-32 text; save it as UTF-8",  # begins as UTF-16's does
    codecs.BOM_UTF32_BE: "UTF-32 text; save it as UTF-8",
    codecs.BOM_UTF16_LE: "UTF-16 text; save it as UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16 text; save it as UTF-8",
    b"\x1f\x8b": "compressed by gzip; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it first",
    b"BZh": "compressed by bzip2; unpack it first",
    b"\xfd7zXZ\0": "compressed by xz; unpack it first",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"PAR1": "a Parquet file; write its rows as JSON lines first",
    b"ARROW1": "an Arrow file; write its rows as JSON lines first",
    b"version https://git-lfs": "a Git LFS pointer; run `git lfs pull` in its folder",
}


def check(file: Path) -> None:
    """CalibrationError for what is no file or cannot be opened; nothing of it is read."""
    try:
        _check_kind(file)
        file.open("rb").close()
    except OSError as fault:
        raise CalibrationError(f"{file} cannot be read: {fault.strerror}") from fault


def _check_kind(file: Path) -> None:
    mode = file.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # it is read more than once
        raise CalibrationError(f"{file} is a pipe or a device; write its content to a file")


def read(file: Path) -> bytes:
    """The content of `file`; CalibrationError where it cannot be read, or is plainly no UTF-8.

    Single bytes are not looked at: whoever decodes them knows the line to name.
    """
    try:
        _check_kind(file)
        content = file.read_bytes()
    except OSError as fault:
        raise CalibrationError(f"{file} cannot be read: {fault.strerror}") from fault
    for begins, what in _OTHERS.items():
        if content.startswith(begins):
            raise CalibrationError(f"{file} is {what}")
    # Text has no NUL, and UTF-16 without a mark has one in every other byte of plain English.
    if b"\0" in content[:4] and content[:4].strip(b"\0"):
        raise CalibrationError(f"{file} is UTF-16 or UTF-32 text; save it as UTF-8")
    return content.removeprefix(codecs.BOM_UTF8)
