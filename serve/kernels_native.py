"""Builds and loads the C++ kernels, once per machine. Nothing ever depends on it succeeding.

The library is compiled for one instruction-set level with the machine's own g++ and kept under a
name that hashes everything it was made from, the compiler included, so a new source, torch, level
or compiler never meets an old file. It is published by one rename under a file lock: processes that
start together wait for the first, and a crash leaves no half library. A copy in this package's
folder (an image built elsewhere) is preferred, whatever compiled it; so is a kept one where no
compiler works any more. Where there is none, nor a place to keep one, `load` says why in one
warning and returns False; `serve.kernels_ops` then runs on PyTorch's own packed kernels.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import IO

import torch

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels_cpu.cpp")
SOURCES = (SOURCE, SOURCE.with_name("lora_cpu.cpp"))  # one library
COMPILER_TIMEOUT_S = 120.0
VERSION_TIMEOUT_S = 10.0
LEVELS: dict[str, tuple[str, ...]] = {
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma",
               "-mf16c"),
}  # fmt: skip
# No float flag that changes a result: NaN and infinity go through as in PyTorch. These two only say
# that nobody reads `errno` or catches a floating-point trap, without which loops that round become
# calls instead of vector code.
FLAGS = ("-O3", "-std=c++20", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno",
         "-fno-trapping-math")  # fmt: skip


class BuildError(Exception):
    """The kernels could not be compiled; the message holds the compiler's last words."""


def level() -> str | None:
    """This process's instruction-set level, honouring ATEN_CPU_CAPABILITY; None below AVX2."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512" and torch.cpu._is_vnni_supported():
        return "avx512"
    return "avx2" if capability in ("AVX2", "AVX512") else None


@cache
def load(folder: Path | None = None) -> bool:
    """Make torch.ops.quantserve.* callable, compiling at most once into `folder`.

    The default folder is ~/.cache/quantserve/kernels. Seconds the first time on a machine,
    milliseconds afterwards. False, with one logged warning, when this machine cannot.
    """
    isa = level()
    if isa is None:
        logger.warning("native kernels need AVX2: running on PyTorch's own, slower")
        return False
    try:
        torch.ops.load_library(str(built(isa, folder)))  # type: ignore[no-untyped-call]
    except (BuildError, OSError) as fault:
        logger.warning("native kernels unavailable, running on PyTorch's own, slower: %s", fault)
        return False
    return True


def built(isa: str, folder: Path | None = None, sources: tuple[Path, ...] = SOURCES) -> Path:
    """The library for `isa`: shipped beside the source, kept in `folder`, or compiled into it.

    BuildError or OSError says why there is none.
    """
    library = place(isa, folder, sources)
    if not library.is_file():  # a folder that cannot be written to will do, where it has one
        folder = library.parent
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (folder / "lock").open("w") as lock:
            _wait_for(lock)
            if not library.is_file():
                _compile(isa, sources, library)
    return library


def place(isa: str, folder: Path | None = None, sources: tuple[Path, ...] = SOURCES) -> Path:
    """Where the library lies, or will once it is compiled. BuildError where it cannot be."""
    name = f"kernels-{isa}-{_identity(isa, sources)}"
    if (shipped := _any(sources[0].parent, name)) is not None:
        return shipped
    folder = folder or _cache()
    try:
        version = _version()
    except BuildError:
        if (kept := _any(folder, name)) is not None:
            return kept
        raise
    return folder / f"{name}-{version}.so"


def _cache() -> Path:
    try:
        return Path.home() / ".cache" / "quantserve" / "kernels"
    except RuntimeError as fault:  # a user without a name, and no HOME
        raise BuildError("no home directory to keep them in") from fault


def _any(folder: Path, name: str) -> Path | None:
    return max(folder.glob(f"{name}-*.so"), default=None)


def _version() -> str:
    """What tells the compiler's version from others. BuildError."""
    return hashlib.sha256(
        _output([compiler(), "--version"], VERSION_TIMEOUT_S).encode()
    ).hexdigest()[:8]


def compiler() -> str:
    """The machine's C++ compiler. BuildError."""
    found = shutil.which("g++") or shutil.which("c++")
    if found is None:
        raise BuildError("no C++ compiler (g++) on this machine")
    return found


def _output(command: list[str], timeout_s: float) -> str:
    """What a compiler prints; it ends within `timeout_s`, and all that it started. BuildError."""
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    except OSError as fault:
        raise BuildError(f"{command[0]} does not run: {fault}") from fault
    with process:
        try:
            printed, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as fault:
            os.killpg(process.pid, signal.SIGKILL)
            raise BuildError(f"{command[0]} took more than {timeout_s:g} s") from fault
    if process.returncode:
        raise BuildError(f"{command[0]} failed: {printed.strip()[-500:]}")
    return printed


def _wait_for(lock: IO[str]) -> None:
    """BuildError where another process holds it for longer than compiling may take."""
    end = time.monotonic() + COMPILER_TIMEOUT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as fault:
            if time.monotonic() > end:
                raise BuildError(f"another process holds {lock.name}") from fault
            time.sleep(0.05)
        else:
            return


def _identity(isa: str, sources: tuple[Path, ...]) -> str:
    texts = [source.read_text() for source in sources]
    made_of = [*texts, torch.__version__, *FLAGS, *LEVELS[isa]]
    return hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]


def _compile(isa: str, sources: tuple[Path, ...], library: Path) -> None:
    root = Path(torch.__file__).parent
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        fresh = Path(scratch) / library.name
        command = [compiler(), *FLAGS, *LEVELS[isa], f"-I{root / 'include'}", *map(str, sources),
                   f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
                   f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", "-o", str(fresh)]  # fmt: skip
        _output(command, COMPILER_TIMEOUT_S)
        os.replace(fresh, library)
    logger.info("compiled native kernels (%s) in %.1f s", isa, time.monotonic() - began)
