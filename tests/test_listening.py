"""The socket: bound once, its real address said, encrypted where the operator says so."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest

from serve.errors import SettingsError
from serve.listening import address, bind, encryption
from serve.settings import Settings


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_certificate(tmp_path_factory.mktemp("tls"))


def write_certificate(folder: Path, password: str = "") -> tuple[Path, Path]:
    """A certificate of nobody's for 127.0.0.1, and its key."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    secret = ["-passout", f"pass:{password}"] if password else ["-nodes"]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-subj", "/CN=127.0.0.1", "-days", "1",
         "-keyout", str(key), "-out", str(cert), *secret],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


@pytest.mark.parametrize(
    ("host", "start"), [("127.0.0.1", "http://127.0.0.1:"), ("::1", "http://[::1]:"),
                        ("localhost", "http://127.0.0.1:")],
)  # fmt: skip
def test_the_address_is_that_of_the_socket(host: str, start: str) -> None:
    with bind(host, 0) as listener:
        said = address(listener, Settings())
        assert said.startswith(start) and not said.endswith(":0")
        with socket.create_connection(listener.getsockname()[:2]):
            pass


def test_a_taken_port_is_named() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(SettingsError, match=f"cannot listen on 127.0.0.1:{port}"):
            bind("127.0.0.1", port)


@pytest.mark.parametrize("host", ["256.0.0.1", "[::1]", "no.such.name.invalid", "1.2.3.4"])
def test_a_host_that_is_none_is_named(host: str) -> None:
    with pytest.raises(SettingsError, match="cannot listen on"):
        bind(host, 0)


def test_plain_unless_there_is_a_certificate(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    secured = Settings(ssl_certfile=cert, ssl_keyfile=key)
    assert encryption(Settings()) is None and encryption(secured) is not None
    with bind("127.0.0.1", 0) as listener:
        assert address(listener, secured).startswith("https://")


def test_files_that_do_not_do_are_named(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = certificate
    (tmp_path / "empty").touch()
    locked = write_certificate(tmp_path, password="secret")  # nobody is asked for it
    for wrong in ((tmp_path / "none", None), (tmp_path / "empty", key), (cert, locked[1]),
                  (None, key), locked):  # fmt: skip
        with pytest.raises(SettingsError, match=r"TLS with|give both"):
            encryption(Settings(ssl_certfile=wrong[0], ssl_keyfile=wrong[1]))
