"""A vLLM that is not the one we know is told in one line, before any of it is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from serve import vllm_release
from serve.errors import SettingsError
from serve.static_names import Packages
from serve.vllm_internals import Place
from serve.vllm_release import differences

ROOT = Path(__file__).parent.parent
SOURCE = """
class Handler:
    def __init__(self):
        self.models = {}

    def check(self, request, *, strictly=False):
        return request in self.models

    def answer(self): ...
"""
HOLDS = (
    Place("engine.api:Handler.check", takes="self request strictly"),
    Place("engine.api:Handler.check", takes="self ...", uses="models request"),
    Place("engine.api:Handler", has="models check"),
    Place("engine.api:Moved", only="9.9"),
)
BROKEN = {
    Place("engine.api:Handler.gone"): "engine.api:Handler.gone is not there",
    Place("engine.gone:check"): "engine.gone:check is not there",
    Place("engine.api:Handler.check", takes="self request"): (
        "engine.api:Handler.check takes (self, request, strictly), not (self, request)"
    ),
    Place("engine.api:Handler", has="models lora"): "engine.api:Handler has no lora",
    Place(
        "engine.api:Handler.answer", uses="models"
    ): "engine.api:Handler.answer does not use models",
    Place("engine.api:Handler.answer", body="0123456789ab"): "another body",
    Place("engine.api:Handler", takes=""): "takes (), not ()",
}


@pytest.fixture
def engine(tmp_path: Path) -> Packages:
    (tmp_path / "api.py").write_text(SOURCE)
    (tmp_path / "__init__.py").touch()
    return Packages({"engine": tmp_path})


def test_what_holds_is_silent(engine: Packages) -> None:
    assert list(differences(HOLDS, engine, "1.0")) == []


@pytest.mark.parametrize("row", BROKEN, ids=lambda row: BROKEN[row])
def test_a_difference_is_a_sentence(engine: Packages, row: Place) -> None:
    (told,) = differences([row], engine, "1.0")
    assert BROKEN[row] in told


def test_the_installed_release_is_known() -> None:
    assert vllm_release.release() in vllm_release.RELEASES
    vllm_release.check()


@pytest.mark.parametrize("asked", ["1", "true"])
def test_the_rust_front_end_is_refused_by_name(asked: str) -> None:
    with pytest.raises(SettingsError, match="VLLM_USE_RUST_FRONTEND"):
        vllm_release.refuse_rust_front_end(asked)
    vllm_release.refuse_rust_front_end("0")


def in_a_process(folder: Path, code: str, version: str) -> subprocess.CompletedProcess[str]:
    """Run `code` where another vLLM is found first; importing any of it is an error."""
    (folder / "vllm").mkdir()
    (folder / "vllm" / "__init__.py").write_text("raise RuntimeError('vLLM was imported')")
    told = folder / f"vllm-{version}.dist-info" / "METADATA"
    told.parent.mkdir()
    told.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    path = f"import sys; sys.path[:0] = [{str(folder)!r}, {str(ROOT)!r}]\n"
    return subprocess.run(
        [sys.executable, "-c", path + code], capture_output=True, text=True, check=False
    )


INSPECT = """
from pathlib import Path
from serve import engine_args, settings, worker
engine_args.inspect(settings.Settings(artifact=Path("/nowhere")))
"""


@pytest.mark.parametrize("code", ["import serve.vllm_compat", INSPECT], ids=["plugin", "parent"])
def test_another_release_is_refused_before_anything_of_it_is_imported(
    tmp_path: Path, code: str
) -> None:
    done = in_a_process(tmp_path, code, "9.8.7")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.endswith("vLLM 9.8.7 is installed; quantserve needs 0.32.x or 0.33.x")


def test_a_changed_place_ends_the_worker_with_one_line(tmp_path: Path) -> None:
    """The very check that the worker makes, on a vLLM that has nothing in it."""
    check = "from serve import vllm_release, worker; worker.run(vllm_release.check)"
    done = in_a_process(tmp_path, check, "0.33.0")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("SettingsError: vLLM 0.33.0 is not the 0.33 that quantserve knows: ")
    assert "is not there" in line
