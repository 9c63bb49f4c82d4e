"""Builds and loads the C++ kernels, once per machine. Nothing ever depends on it succeeding.

The library is compiled for one instruction-set level with the machine's own g++ and kept under a
name that hashes everything it was made from, so a new source, torch or level never meets an old
file. It is published by one rename under a file lock: processes that start together wait for the
first, and a crash leaves no half library. A copy in this package's folder (an image built
elsewhere) is preferred. Without a compiler, or when the build fails, `load` says why and returns
False; `serve.kernels_ops` then runs on PyTorch's own packed kernels.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels_cpu.cpp")
SOURCES = (SOURCE, SOURCE.with_name("lora_cpu.cpp"))  # one library
COMPILER_TIMEOUT_S = 120
LEVELS: dict[str, tuple[str, ...]] = {
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma",
               "-mf16c"),
}  # fmt: skip
# The float flags allow loops over activations to become vector code (no errno, no traps, no NaN
# ordering); -ffast-math itself would also flush denormals in the whole process.
FLAGS = ("-O3", "-std=c++20", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno",
         "-fno-trapping-math", "-fno-signed-zeros", "-ffinite-math-only")  # fmt: skip


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
        library = built(isa, folder or Path.home() / ".cache" / "quantserve" / "kernels")
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except (BuildError, OSError) as fault:
        logger.warning("native kernels unavailable, running on PyTorch's own, slower: %s", fault)
        return False
    return True


def built(isa: str, folder: Path, sources: tuple[Path, ...] = SOURCES) -> Path:
    """The library for `isa`, compiled into `folder` unless it is there already. BuildError."""
    name = f"kernels-{isa}-{_identity(isa, sources)}.so"
    shipped = sources[0].with_name(name)
    if shipped.is_file():
        return shipped
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    library = folder / name
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.is_file():
            _compile(isa, sources, library)
    return library


def _identity(isa: str, sources: tuple[Path, ...]) -> str:
    texts = [source.read_text() for source in sources]
    made_of = [*texts, torch.__version__, *FLAGS, *LEVELS[isa]]
    return hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]


def _compile(isa: str, sources: tuple[Path, ...], library: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise BuildError("no C++ compiler (g++) on this machine")
    root = Path(torch.__file__).parent
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        fresh = Path(scratch) / library.name
        command = [compiler, *FLAGS, *LEVELS[isa], f"-I{root / 'include'}", *map(str, sources),
                   f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
                   f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", "-o", str(fresh)]  # fmt: skip
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=COMPILER_TIMEOUT_S
            )
        except subprocess.TimeoutExpired as fault:
            raise BuildError(f"{compiler} took more than {COMPILER_TIMEOUT_S} s") from fault
        if done.returncode:
            raise BuildError(f"{compiler} failed: {done.stderr.strip()[-500:]}")
        os.replace(fresh, library)
    logger.info("compiled native kernels (%s) in %.1f s", isa, time.monotonic() - began)
