"""Writes requirements/gpu.txt, every version of a GPU environment, and gpu.json, what each needs.

    python -m tests.gpu_lock UV          # UV: the `uv` program, which resolves without downloading

Versions that requirements/cpu.txt and stores.txt name are kept wherever vLLM's CUDA build lets them
stand. One set serves Python 3.11 and 3.12, that of vLLM's own image. tests/test_requirements.py
checks the two files against each other, without the network.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "requirements"
HEAD = """\
# Every version of a GPU environment (Linux x86-64, Python 3.11 or 3.12, CUDA 13), resolved for
# vLLM's CUDA build; install with --no-deps. Written by `python -m tests.gpu_lock`, with what each
# package asks for beside it in gpu.json.
"""
# setuptools: vLLM limits it on Python 3.12. cuda-python: older ones fit by asking for nothing.
MORE = ("setuptools>=78.1.1,<81", "cuda-python>=13")
PYTHONS = ("3.11", "3.12")
INDEX = "https://pypi.org/simple"


def main() -> None:
    names = resolved(sys.argv[1])
    (FOLDER / "gpu.txt").write_text(HEAD + "".join(f"{name}=={names[name]}\n" for name in names))
    told = asked_by(FOLDER / "gpu.txt")
    lines = [f" {json.dumps(name)}: {json.dumps(told[name])}" for name in sorted(told)]
    (FOLDER / "gpu.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def resolved(uv: str) -> dict[str, str]:
    """Package -> version, for the oldest Python that is served."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["gpu"], *extras["postgres"], *extras["s3"],
              *extras["gcs"], *extras["azure"], *MORE]  # fmt: skip
    scratch = FOLDER / "gpu.txt"  # uv keeps the versions that it finds there, where it can
    kept = [(FOLDER / name).read_text("utf-8") for name in ("cpu.txt", "stores.txt")]
    lines = [line for text in kept for line in text.splitlines() if "+cpu" not in line]
    scratch.write_text("\n".join(line for line in lines if not line.startswith("vllm")))
    command = [uv, "pip", "compile", "-", "--no-header", "--no-annotate", "-o", str(scratch)]
    command += ["--python-version", PYTHONS[0], "--python-platform", "x86_64-manylinux_2_35"]
    printed = subprocess.run(
        command, input="\n".join(wanted), capture_output=True, text=True, check=True
    ).stdout
    pins = [line.partition("==") for line in printed.splitlines() if "==" in line]
    return {name: version for name, _, version in pins}


def asked_by(pins: Path) -> dict[str, list[str]]:
    """Package -> what it asks for on our Pythons, by pip's report of what it would install."""
    wheels = [
        word for minor in range(5, 40) for word in ("--platform", f"manylinux_2_{minor}_x86_64")
    ]
    older = ("manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64")
    wheels += [word for tag in older for word in ("--platform", tag)]
    with tempfile.TemporaryDirectory() as nowhere:
        report = Path(nowhere) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "-r", str(pins), *wheels, "--quiet"]
        command += ["--dry-run", "--no-deps", "--ignore-installed", "--only-binary=:all:"]
        command += ["--python-version", PYTHONS[0], "--target", nowhere, "--report", str(report)]
        subprocess.run(command, check=True)
        packages = [found["metadata"] for found in json.loads(report.read_text())["install"]]
    every = {normal(told["name"]): told.get("requires_dist") or [] for told in packages}
    asked = [Requirement(line) for lines in every.values() for line in lines]
    extras = {(normal(each.name), extra) for each in asked for extra in each.extras}
    return {
        name: sorted(
            line
            for line in lines
            if applies(Requirement(line), {extra for whose, extra in extras if whose == name})
        )
        for name, lines in every.items()
    }


def applies(asked: Requirement, extras: set[str]) -> bool:
    """On one of our Pythons, to the package itself or to one of its extras."""
    return asked.marker is None or any(
        asked.marker.evaluate({**environment(python), "extra": extra})
        for python in PYTHONS
        for extra in ("", *extras)
    )


def environment(python: str) -> Mapping[str, str]:
    """PEP 508's variables of a GPU host."""
    return {
        "implementation_name": "cpython", "os_name": "posix", "platform_machine": "x86_64",
        "platform_python_implementation": "CPython", "platform_system": "Linux",
        "python_full_version": f"{python}.0", "python_version": python, "sys_platform": "linux",
    }  # fmt: skip


def normal(name: str) -> str:
    return str(canonicalize_name(name))


if __name__ == "__main__":
    main()
