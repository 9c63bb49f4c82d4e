"""How a command finds a server, shows its key, and says what went wrong, in one line."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest

from serve import settings
from serve.client import connection
from serve.client.connection import Address, Connection, ServerError, address, plain
from serve.errors import SettingsError
from serve.serving import Serving
from tests.answering import KEY, Answering, answering, speaking


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(settings.SERVER, raising=False)
    monkeypatch.delenv(settings.API_KEY, raising=False)


@pytest.mark.parametrize(
    ("given", "url"),
    [
        (None, "http://127.0.0.1:8000"),
        ("http://gpu-1:9000/", "http://gpu-1:9000"),
        ("gpu-1:9000", "http://gpu-1:9000"),
        ("https://models.example/quant/v1", "https://models.example/quant"),
        ("http://[::1]:8000/v1/", "http://[::1]:8000"),
    ],
)
def test_an_address_as_people_write_it(given: str | None, url: str) -> None:
    assert address(given).url == url


@pytest.mark.parametrize(
    "given",
    ["ftp://x", "http://", "http://a b", "http://x?y=1", "http://me:secret@x", "http://x:port"],
)
def test_what_is_no_address(given: str) -> None:
    with pytest.raises(SettingsError, match="--server") as refused:
        address(given)
    assert "secret" not in str(refused.value)


def test_the_environment_names_the_server_and_the_key_and_options_win(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(settings.SERVER, "http://gpu-1:1")
    monkeypatch.setenv(settings.API_KEY, "sk-env")
    assert (address().url, address().key) == ("http://gpu-1:1", "sk-env")
    (tmp_path / "key").write_text("sk-file\n")
    found = address("gpu-2:1", tmp_path / "key")
    assert (found.url, found.key) == ("http://gpu-2:1", "sk-file")
    assert "sk-file" not in repr(found)
    settings.load()  # a server that is started in the same shell takes them for nobody's


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"ops:admin,inference:sk-1", "NAME:SCOPES:KEY"),
        (b"", "is empty"),
        (b"two words", "one word"),
        (b"one\ntwo", "one word"),
        ("schlüssel".encode(), "one word"),
        (b"\xff\xfe", "UTF-8"),
        (None, "cannot read"),
    ],
    ids=["servers", "empty", "words", "lines", "umlaut", "bytes", "missing"],
)
def test_what_is_no_key_file(tmp_path: Path, text: bytes | None, why: str) -> None:
    if text is not None:
        (tmp_path / "key").write_bytes(text)
    with pytest.raises(SettingsError, match=why) as refused:
        address(key_file=tmp_path / "key")
    assert str(tmp_path / "key") in str(refused.value)


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (409, {"error": {"message": "is  taken\n\x1b[2J"}}, "is taken [2J"),
        (404, {"detail": "Not Found"}, "answered 404: Not Found; is it a quantserve?"),
        (502, b"<html>", "answered 502: Said; is it a quantserve?"),
        (307, b"", "answered 307"),
        (200, b"hello", "no JSON object"),
        (200, b"[" * 100_000, "no JSON object"),
        (200, b"[1]", "no JSON object"),
        (401, {"error": {"message": "no API key given"}}, "given (by --key-file FILE or QUANT"),
    ],
    ids=["ours", "detail", "html", "redirect", "text", "deep", "list", "key"],
)
async def test_what_is_no_good_answer_is_one_line(status: int, body: Any, told: str) -> None:
    said = speaking(status, body, location="http://127.0.0.1:9/")
    async with said as url, Connection(Address(url)) as asked:
        with pytest.raises(ServerError) as fault:
            await asked.get("/v1/models")
    assert told in str(fault.value) and fault.value.answered == (status if status != 200 else 0)
    assert str(fault.value).isprintable()


async def test_an_answer_is_bounded_in_bytes_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "ANSWER_BYTES", 1 << 20)
    async with speaking(200, b"x" * ((1 << 20) + 1)) as url, Connection(Address(url)) as asked:
        with pytest.raises(ServerError, match="more than 1 MiB"):
            await asked.get("/")
        with pytest.raises(ServerError, match="does not answer"):
            await asked.send("GET", "/", within_s=0)


async def test_nobody_there_says_how_to_start_one() -> None:
    async with Connection(Address("http://127.0.0.1:9")) as asked:
        with pytest.raises(ServerError, match=r"127.0.0.1:9: .*refused; start one by `quantserve"):
            await asked.get("/")


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """For 127.0.0.1, signed by itself, its key in the same file."""
    path = tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", str(tmp_path / "key.pem"), "-out", str(path)],
        check=True, capture_output=True,
    )  # fmt: skip
    path.write_text(path.read_text() + (tmp_path / "key.pem").read_text())
    return path


async def test_a_certificate_is_trusted_by_its_file_only(
    serving: Serving, certificate: Path, tmp_path: Path
) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    async with answering(serving, context) as live:
        async with Connection(Address(live.url, KEY, certificate)) as asked:
            assert await asked.get("/readyz") == {"status": "ready"}
        async with Connection(Address(live.url, KEY)) as asked:
            with pytest.raises(ServerError, match=r"is not trusted.*--cacert"):
                await asked.get("/readyz")
    for path in (tmp_path / "none", tmp_path / "keys"):
        with pytest.raises(SettingsError, match="--cacert"):
            Connection(Address(live.url, KEY, path))


async def test_a_key_is_shown_to_the_server_and_its_lack_is_told(live: Answering) -> None:
    async with Connection(Address(live.url)) as asked:
        with pytest.raises(ServerError, match="--key-file") as fault:
            await asked.get("/v1/models")
    assert fault.value.answered == 401
    async with Connection(Address(live.url, KEY)) as asked:
        assert (await asked.get("/v1/models"))["data"]


def test_words_do_nothing_to_a_terminal() -> None:
    assert plain("a\x1b]0;b\x07 \n c\u200d\x9b") == "a]0;b c\u200d"
