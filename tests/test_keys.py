"""Keys: who they belong to, what they allow, and which line of the file is wrong."""

from __future__ import annotations

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
    path = tmp_path / "keys"
    path.write_text(FILE)
    return keys.load(path)


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
    path = tmp_path / "keys"
    path.write_text(f"# first\n{line}\n")
    with pytest.raises(SettingsError, match=r"keys:2"):
        keys.load(path)


def test_a_file_without_keys_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# nothing\n")
    with pytest.raises(SettingsError, match="holds no key"):
        keys.load(path)
