"""`serve.given_files`: what an operator names is read, and never waited for without end."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest

from serve import given_files, keys
from serve.client import connection
from serve.errors import SettingsError
from serve.listening import encryption
from serve.settings import Settings

LINE = "app:inference:sk-0123456789abcdef"


def certified(path: Path) -> None:
    encryption(Settings(ssl_certfile=path))


def trusted(path: Path) -> None:
    connection.Connection(connection.Address("https://127.0.0.1", cacert=path))


@pytest.mark.parametrize(
    "reader", [keys.load, connection._only_line, certified, trusted], ids=lambda f: f.__name__
)
def test_a_pipe_that_nobody_writes_into_is_named(
    reader: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(given_files, "PIPE_S", 0.05)
    os.mkfifo(tmp_path / "f")
    with pytest.raises(SettingsError, match=r"f is a .*pipe"):
        reader(tmp_path / "f")


def test_a_pipe_of_the_shells_is_read_to_its_end_however_it_comes() -> None:
    reading, writing = os.pipe()

    def write() -> None:
        with open(writing, "wb", buffering=0) as file:
            for line in (LINE, LINE.replace("app", "ops").replace("0", "9")):
                file.write(f"{line}\n".encode())

    writer = Thread(target=write)
    writer.start()
    found = given_files.content(Path(f"/dev/fd/{reading}"), 1 << 20)
    writer.join()
    os.close(reading)
    assert found.decode().splitlines()[0] == LINE and found.count(b"\n") == 2


def test_no_more_is_read_than_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 200_000)
    assert len(given_files.content(tmp_path / "f", 150_000)) == 150_000
    assert len(given_files.content(Path("/dev/zero"), 150_000)) == 150_000
