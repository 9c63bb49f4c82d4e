"""Keys: who they belong to, what they allow, and which line of the file is wrong."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from serve import keys
from serve.errors import InvalidKey, SettingsError

FILE = """# comment
app:inference:sk-app-0123456789

prometheus:metrics:sk-prom-0123456789
ops:inference,admin:sk-ops-0123456789
"""


@pytest.fixture
def loaded(tmp_path: Path) -> keys.Keys:
    return keys.load(put(tmp_path / "keys", FILE))


def test_a_key_names_its_caller_and_scopes(loaded: keys.Keys) -> None:
    caller = loaded.caller("Bearer sk-app-0123456789")
    assert caller.name == "app" and caller.may("inference")
    assert not caller.may("metrics") and not caller.may("admin")


def test_admin_includes_the_other_scopes(loaded: keys.Keys) -> None:
    assert loaded.caller("bearer sk-ops-0123456789").may("metrics")


@pytest.mark.parametrize("header", [None, "", "Bearer", "Basic abc", "Bearer sk-app-012345678"])
def test_anything_else_is_refused(loaded: keys.Keys, header: str | None) -> None:
    with pytest.raises(InvalidKey):
        loaded.caller(header)


def test_without_a_file_everybody_may_everything() -> None:
    assert keys.load(None).caller(None).may("admin")


@pytest.mark.parametrize(
    "line", ["only-a-name", "a:root:sk-0123456789abcdef", "a:inference:short", ":inference:sk-0123"]
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(SettingsError, match=r"keys:2"):
        keys.load(put(tmp_path / "keys", f"# first\n{line}\n"))


def test_a_file_without_keys_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="holds no key"):
        keys.load(put(tmp_path / "keys", "# nothing\n"))


def put(path: Path, text: str | bytes, mode: int = 0o600) -> Path:
    path.unlink(missing_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a:inference:sk-0123456789abcdef\nb:admin:sk-0123456789abcdef\n", r"keys:2.*line 1"),
        ("a:inference:sk-0123456789abcdef\na:admin:sk-123456789abcdef0\n", r"keys:2.*other scopes"),
        ("a::sk-0123456789abcdef", r"keys:1: expected"),
        ("a:inference,:sk-0123456789abcdef", r"keys:1: expected"),
        ("a:inference:sk-0123456789\0abcdef", "NUL"),
        ("a:inference:sk-0123456789 abcdef", "keys:1.*blanks"),
        ("a:inference:sk-0123456789äbcdef", "keys:1.*ASCII"),
        ("ä:inference:sk-0123456789abcdef".encode("latin-1"), "byte 0 is not UTF-8"),
        ("a:inference:sk-0123456789abcdef".encode("utf-16"), "byte 0 is not UTF-8"),
        ("a:inference:sk-0123456789abcdef".encode("utf-16-le"), "NUL"),
        (b"", "holds no key"),
    ],
)
def test_what_a_file_must_not_hold_is_one_line(
    tmp_path: Path, text: str | bytes, said: str
) -> None:
    with pytest.raises(SettingsError, match=said) as caught:
        keys.load(put(tmp_path / "keys", text))
    assert "\n" not in str(caught.value) and "0123456789" not in str(caught.value)


def test_a_byte_order_mark_and_other_line_ends_are_no_part_of_a_name(tmp_path: Path) -> None:
    text = FILE.removeprefix("# comment\n").replace("\n", "\r\n").encode("utf-8-sig")
    loaded = keys.load(put(tmp_path / "keys", text))
    assert loaded.caller("Bearer sk-app-0123456789").name == "app"


def test_a_name_may_have_two_keys_of_one_scope(tmp_path: Path) -> None:
    two = "a:inference:sk-0123456789abcdef\na:inference:sk-123456789abcdef0\n"
    loaded = keys.load(put(tmp_path / "keys", two))
    assert loaded.caller("Bearer sk-123456789abcdef0") == loaded.caller(
        "Bearer sk-0123456789abcdef"
    )


@pytest.mark.parametrize(("mode", "good"), [(0o600, True), (0o644, True), (0o664, False),
                                            (0o666, False), (0o602, False)])  # fmt: skip
def test_a_file_that_others_can_write_is_refused(tmp_path: Path, mode: int, *, good: bool) -> None:
    path = put(tmp_path / "keys", FILE, mode)
    if good:
        keys.load(path)
    else:
        with pytest.raises(SettingsError, match=f"mode {mode:o}"):
            keys.load(path)


def test_the_key_counts_in_anthropics_header_where_a_route_takes_it(loaded: keys.Keys) -> None:
    assert loaded.caller(None, "sk-app-0123456789").name == "app"
    with pytest.raises(InvalidKey, match="not known"):
        loaded.caller(None, "sk-app-012345678")
    with pytest.raises(InvalidKey, match="not known"):
        loaded.caller("Bearer wrong", "sk-app-0123456789")  # the first decides
    with pytest.raises(InvalidKey, match="x-api-key: KEY"):
        loaded.caller(None, "")
    with pytest.raises(InvalidKey) as caught:
        loaded.caller(None)
    assert "x-api-key" not in str(caught.value)


async def test_a_changed_file_is_read_again_and_a_bad_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By a rename, as editors do, and by a link that is swapped, as Kubernetes does."""
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    put(tmp_path / "1" / "keys", FILE)
    link = tmp_path / "now"
    link.symlink_to("1")
    loaded = keys.load(link / "keys")
    following = asyncio.create_task(loaded.follow(0.01))

    put(tmp_path / "2" / "keys", "new:inference:sk-new-0123456789\n")
    (tmp_path / "next").symlink_to("2")
    (tmp_path / "next").rename(link)
    await until(lambda: known(loaded, "sk-new-0123456789"))
    assert not known(loaded, "sk-ops-0123456789"), "a revoked key still works"

    put(tmp_path / "bad", "nonsense")
    (tmp_path / "bad").rename(link / "keys")
    await until(lambda: "stay as they were" in caplog.text)
    assert known(loaded, "sk-new-0123456789")
    (link / "keys").unlink()
    await until(lambda: caplog.text.count("stay as they were") == 2)
    assert known(loaded, "sk-new-0123456789")
    put(link / "keys", FILE)
    await until(lambda: known(loaded, "sk-ops-0123456789"))
    following.cancel()
    assert "sk-new" not in caplog.text and "sk-ops" not in caplog.text


def known(loaded: keys.Keys, key: str) -> bool:
    try:
        loaded.caller(f"Bearer {key}")
    except InvalidKey:
        return False
    return True


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not true():  # noqa: ASYNC110 - files have no events here
            await asyncio.sleep(0.01)


def test_a_pipe_in_place_of_the_file_is_not_waited_for(tmp_path: Path) -> None:
    """Whoever opens one waits for its writer, and every request with him."""
    path = tmp_path / "keys"
    path.write_text(FILE)
    path.chmod(0o600)
    loaded = keys.load(path)
    path.unlink()
    os.mkfifo(path)
    assert "is not a plain file" in loaded.reload()
