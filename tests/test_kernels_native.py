"""Building the C++ kernels: once, under a name of everything they are made of, or not at all.

The compiler is the machine's own behind a script that counts its runs; small sources keep it fast.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from serve import kernels_native

COMPILER = shutil.which("g++") or shutil.which("c++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

BUILD = """
import sys
from pathlib import Path
from serve import kernels_native
print(kernels_native.built("avx2", Path(sys.argv[1]), (Path(sys.argv[2]),)))
"""
ANSWER = """
import torch
from serve import kernels_ops
codes, scales = torch.randint(-8, 8, (16, 64)), torch.rand(16, 2)
layer = kernels_ops.pack(codes, scales, 4)
x = torch.randn(3, 64)
wanted = x @ (codes * scales.repeat_interleave(32, dim=1)).t()
print(type(layer).__name__, float((layer(x, None) - wanted).norm() / wanted.norm()) < 1e-2)
wide = torch.randn(40, 64).bfloat16()
print(float((kernels_ops.wide_linear(x, wide) - x @ wide.float().t()).abs().max()) < 1e-4)
"""


@dataclass(frozen=True)
class Workshop:
    """A source, a place for libraries, and a compiler that keeps count."""

    folder: Path
    source: Path
    log: Path
    script: Path

    def write(self, answer: str) -> None:
        self.source.write_text(f'extern "C" int answer() {{ return {answer}; }}')

    def compiler(self, commands: str, version: str = "echo g++ 1.0") -> None:
        """A compiler that answers `--version` as told, and compiles by `commands`."""
        asked = f'[ "$1" = --version ] && {{ {version}; exit; }}'
        self.script.write_text(f'#!/bin/sh\n{asked}\necho run >> "{self.log}"\n{commands}\n')
        self.script.chmod(0o755)

    def build(self, isa: str = "avx2") -> Path:
        return kernels_native.built(isa, self.folder, (self.source,))

    @property
    def runs(self) -> int:
        return len(self.log.read_text().split()) if self.log.exists() else 0

    @property
    def left(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir() if path.name != "lock")


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "g++"
    made = Workshop(tmp_path / "libraries", tmp_path / "one.cpp", tmp_path / "log", script)
    made.write("42")
    made.compiler(f'exec {COMPILER} "$@"')
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    return made


def answer_of(library: Path) -> int:
    return int(ctypes.CDLL(str(library)).answer())


@needs_compiler
def test_a_source_is_compiled_once(workshop: Workshop) -> None:
    first = workshop.build()
    assert answer_of(first) == 42
    assert workshop.build() == first
    assert (workshop.runs, workshop.left) == (1, [first.name])


@needs_compiler
def test_another_source_or_level_is_another_library(workshop: Workshop) -> None:
    old = workshop.build()
    workshop.write("43")
    new, wider = workshop.build(), workshop.build("avx512")
    assert (answer_of(old), answer_of(new)) == (42, 43)
    assert len({old, new, wider}) == workshop.runs == 3


@needs_compiler
def test_another_compiler_is_another_library(workshop: Workshop) -> None:
    old = workshop.build()
    workshop.compiler(f'exec {COMPILER} "$@"', version="echo g++ 2.0")
    assert workshop.build() != old
    workshop.compiler(f'exec {COMPILER} "$@"')
    assert workshop.build() == old
    assert workshop.runs == 2


WITHOUT_COMPILER = {
    "broken": "exit 1",
    "killed": "kill -9 $$",
    "hangs": "sleep 60 & sleep 60",
}


@needs_compiler
@pytest.mark.parametrize("version", WITHOUT_COMPILER.values(), ids=WITHOUT_COMPILER)
def test_a_compiler_that_does_not_work_leaves_what_is_kept(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    kept = workshop.build()
    monkeypatch.setattr(kernels_native, "VERSION_TIMEOUT_S", 0.2)
    workshop.compiler("exit 1", version=version)
    assert workshop.build() == kept
    workshop.write("43")
    with pytest.raises(kernels_native.BuildError, match=r"failed|took more than 0\.2 s"):
        workshop.build()


@needs_compiler
def test_a_folder_that_cannot_be_written_will_do_where_it_has_the_library(
    workshop: Workshop,
) -> None:
    kept = workshop.build()
    (workshop.folder / "lock").unlink()
    (workshop.folder / "lock").mkdir()  # nobody can open it for writing, not even root
    assert workshop.build() == kept
    workshop.write("43")
    with pytest.raises(OSError, match="Is a directory"):
        workshop.build()


def test_a_compiler_that_hangs_is_ended_with_all_that_it_started(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    workshop.compiler(f'sleep 600 &\necho $! > "{tmp_path / "pid"}"\nwait')
    monkeypatch.setattr(kernels_native, "COMPILER_TIMEOUT_S", 1.0)
    with pytest.raises(kernels_native.BuildError, match="took more than 1 s"):
        workshop.build()
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int((tmp_path / "pid").read_text())).wait(30)  # fails where it lives on
    assert workshop.left == []


def test_a_lock_that_is_never_given_back_is_not_waited_for(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels_native, "COMPILER_TIMEOUT_S", 0.2)
    workshop.folder.mkdir()
    with (workshop.folder / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(kernels_native.BuildError, match="another process holds"):
            workshop.build()


@needs_compiler
def test_two_processes_that_start_together_share_one_compilation(workshop: Workshop) -> None:
    workshop.compiler(f'sleep 1\nexec {COMPILER} "$@"')
    command = [sys.executable, "-c", BUILD, str(workshop.folder), str(workshop.source)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=300)[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert printed[0] == printed[1]
    assert answer_of(Path(printed[0])) == 42
    assert workshop.runs == 1


@needs_compiler
def test_a_source_with_an_error_leaves_nothing(workshop: Workshop) -> None:
    workshop.write("forty_two")
    with pytest.raises(kernels_native.BuildError, match="forty_two"):
        workshop.build()
    assert workshop.left == []


def test_a_compiler_that_dies_halfway_leaves_nothing_and_may_try_again(workshop: Workshop) -> None:
    workshop.compiler('for last; do :; done\necho half > "$last"\nkill -9 $$')
    for _ in range(2):
        with pytest.raises(kernels_native.BuildError):
            workshop.build()
    assert (workshop.runs, workshop.left) == (2, [])


def test_a_library_beside_the_source_is_preferred(workshop: Workshop) -> None:
    workshop.compiler('for last; do :; done\necho whole > "$last"')
    shipped = workshop.source.with_name(workshop.build().name)
    shipped.write_text("from an image")
    assert workshop.build() == shipped
    assert workshop.runs == 1


def test_no_compiler_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert kernels_native.load(tmp_path) is False
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "no C++ compiler" in caplog.text


def test_no_place_for_libraries_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    assert kernels_native.load(tmp_path / "file" / "libraries") is False
    assert "Not a directory" in caplog.text


@needs_compiler
@pytest.mark.skipif(not kernels_native.load(), reason="native kernels do not build")
def test_a_broken_library_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    level = kernels_native.level()
    assert level is not None
    (tmp_path / kernels_native.built(level).name).write_text("not a library")
    assert kernels_native.load(tmp_path) is False
    assert "native kernels unavailable" in caplog.text


STRANGER = """
import os, torch
from serve import kernels_native
if os.geteuid() == 0:
    os.setuid(12345)
"""
PLACES = {
    "no compiler": ({"PATH": "/nowhere", "HOME": "/nowhere"}, "no C++ compiler"),
    "no home": ({"HOME": "/proc/nowhere"}, "/proc/nowhere"),
    "a home without rights": ({"HOME": "/proc"}, "/proc"),
}


@pytest.mark.parametrize("place", PLACES)
def test_where_nothing_can_be_built_layers_still_answer_right(place: str) -> None:
    env, reason = PLACES[place]
    lines, stderr = answers({**os.environ, **env}, ANSWER)
    assert lines == ["AtenLinear", "True", "True"], stderr
    assert stderr.count("native kernels unavailable") == 1 and reason in stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_user_without_a_name_or_a_home_gets_answers() -> None:
    env = {name: value for name, value in os.environ.items() if name != "HOME"}
    lines, stderr = answers(env, STRANGER + ANSWER)
    assert lines == ["AtenLinear", "True", "True"], stderr
    assert stderr.count("native kernels unavailable") == 1
    assert "no home directory" in stderr


@needs_compiler
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_user_without_a_name_gets_the_shipped_library(tmp_path: Path) -> None:
    """As in an image that runs under a number of the cluster's choice."""
    shipped = tmp_path / "serve"
    shutil.copytree(Path(kernels_native.__file__).parent, shipped)
    level = kernels_native.level()
    assert level is not None
    library = kernels_native.built(level)
    shutil.copy(library, shipped / library.name)
    env = {name: value for name, value in os.environ.items() if name != "HOME"}
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + STRANGER + ANSWER
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == "root" and folder.name.startswith(("pytest-", "popen-", "test_")):
            folder.chmod(0o755)
    lines, stderr = answers(env, code)
    assert lines == ["NativeLinear", "True", "True"], stderr
    assert "native kernels" not in stderr


def answers(env: dict[str, str], code: str) -> tuple[list[str], str]:
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    return done.stdout.split(), done.stderr


def test_below_avx2_there_is_no_level() -> None:
    code = "from serve import kernels_native; print(kernels_native.level(), kernels_native.load())"
    env = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    printed = subprocess.check_output(
        [sys.executable, "-c", code], env=env, text=True, stderr=subprocess.DEVNULL
    )
    assert printed.split() == ["None", "False"]
