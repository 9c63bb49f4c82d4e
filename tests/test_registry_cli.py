"""`quantserve registry check` and `restore`, as an operator calls them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes import BY, replica

QUANTSERVE = str(Path(sys.executable).with_name("quantserve"))


def call(*words: str | Path, **env: str) -> tuple[int, str]:
    """The exit status, and all that is said."""
    done = subprocess.run(
        [QUANTSERVE, "registry", *map(str, words)],
        capture_output=True, text=True, timeout=300, env={**os.environ, **env}, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


def files(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern))


@pytest.fixture
async def state(tmp_path: Path, folders: list[Path]) -> Path:
    """A state dir in which an alias was served."""
    folder = tmp_path / "state"
    made = replica(folder, f"sqlite:///{folder}/registry.sqlite")
    await made.reconciler.start(0.01)
    await made.catalog.put("legal", str(folders[0]), BY)
    await made.reconciler.turn()
    made.registry.close()
    return folder


async def test_what_is_whole_is_told_and_left_alone(state: Path) -> None:
    before = (state / "registry.sqlite").read_bytes()
    status, told = call("check", "--state-dir", state)
    assert status == 0 and told.endswith("whole\n")
    assert "revision 1, 1 aliases (legal), 1 events" in told
    assert call("check", QUANTSERVE_STATE_DIR=str(state))[0] == 0
    status, told = call("restore", "--state-dir", state, "--yes")
    assert status == 0 and "nothing to restore" in told
    assert (state / "registry.sqlite").read_bytes() == before


async def test_what_is_lost_is_told_and_restored_when_it_is_asked_for(state: Path) -> None:
    file = state / "registry.sqlite"
    file.write_bytes(b"garbage " * 64)
    status, told = call("check", "--state-dir", state)
    assert status == 1 and "not a database" in told and "registry restore" in told
    status, told = call("restore", "--state-dir", state)
    assert status == 1 and "do it with --yes" in told and file.read_bytes() == b"garbage " * 64
    status, told = call("restore", "--state-dir", state, "--yes")
    assert status == 0 and "restored 1 aliases of revision 1" in told
    (kept,) = files(state, "registry.sqlite.damaged-*")
    assert str(kept) in told and kept.read_bytes() == b"garbage " * 64
    assert call("check", "--state-dir", state)[0] == 0


async def test_without_anything_seen_there_is_nothing_to_restore(state: Path) -> None:
    (state / "registry-cache.json").unlink()
    assert call("check", "--state-dir", state)[0] == 0
    (state / "registry.sqlite").unlink()
    status, told = call("check", "--state-dir", state)
    assert status == 1 and "is gone" in told and "nothing was last seen" in told
    status, told = call("restore", "--state-dir", state, "--yes")
    assert status == 1 and "nothing to restore" in told
    assert files(state, "registry*") == []


async def test_a_disk_that_takes_nothing_is_one_line(state: Path) -> None:
    (state / "registry.sqlite").unlink()
    (state / ".registry.sqlite.restored").mkdir()
    status, told = call("restore", "--state-dir", state, "--yes")
    assert status == 1 and told.count("\n") == 1


async def test_another_registry_behind_the_url_is_not_taken_for_ours(
    state: Path, tmp_path: Path, folders: list[Path]
) -> None:
    url = f"sqlite:///{tmp_path}/other.sqlite"
    other = replica(tmp_path / "other", url)
    await other.reconciler.start(0.01)
    await other.catalog.put("theirs", str(folders[1]), BY)
    other.registry.close()
    status, told = call("check", "--state-dir", state, "--database-url", url)
    assert status == 1 and "theirs" in told and "not whole" in told


def test_what_is_given_wrongly_is_one_line_and_status_2(tmp_path: Path) -> None:
    for words in (("check",), ("check", "--state-dir", tmp_path, "--database-url", "mysql://x")):
        status, told = call(*words)
        assert status == 2 and told.count("\n") == 1
