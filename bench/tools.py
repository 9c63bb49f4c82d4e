"""Other quantizers, each in a virtual environment of its own, run on our calibration tokens.

The environments are made here, on first use and from pinned versions. What a run takes is measured
from outside: seconds, and the memory of its whole process tree.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bench import yardstick
from quant import calibration
from quant.intake.source import Source
from quant.recipe import Recipe, Scheme

TORCH_CPU = "https://download.pytorch.org/whl/cpu"
SAMPLE_SECONDS = 0.2


class Failed(Exception):
    """A rival that gave nothing to measure, and why."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A package, the torch it runs on, our script that drives it, and what else it needs."""

    package: str
    version: str
    torch: str
    script: str
    env: Mapping[str, str] = field(default_factory=dict)
    beside: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rival:
    """A tool with settings; `options` are those that are not its defaults."""

    tool: Tool
    options: Mapping[str, Any] = field(default_factory=dict)
    schemes: tuple[Scheme, ...] = ("w4a16",)


@dataclass(frozen=True, slots=True)
class Asked:
    """What everybody is to do."""

    opened: Source
    scheme: Scheme
    group: int
    rows: calibration.Batches
    recipe: Recipe
    calibration: Path
    threads: int
    limit: float
    cache: Path
    again: bool = False
    isa: str = "auto"
    gpu: bool = False  # theirs is a torch that sees one

    def out(self, name: str) -> Path:
        """Where this contender's checkpoint goes."""
        order = (name, self.opened.folder.name, self.scheme, self.group, self.threads,
                 self.isa, self.rows.report.digest[:12])  # fmt: skip
        return self.cache / "made" / re.sub(r"[^\w.]+", "-", "-".join(map(str, order)))


@dataclass(frozen=True, slots=True)
class Cost:
    seconds: float
    peak_bytes: int


# Its pool asks for two workers that load models and, on two cores, has one in all: it does not
# start. The only change from its defaults that every run of it has.
GPTQMODEL = Tool(
    "gptqmodel", "7.7.0", "2.14.1", "rival_gptqmodel.py", {"GPTQMODEL_CPU_WORKERS": "2"}
)
LLM_COMPRESSOR = Tool("llmcompressor", "0.14.0.1", "2.13.0", "rival_llmcompressor.py")
# Without compressed-tensors it cannot write W8A8, and does not ask for it.
AUTOROUND = Tool(
    "auto-round", "0.16.1", "2.13.0", "rival_autoround.py", beside=("compressed-tensors==0.19.0",)
)
RIVALS: Mapping[str, Rival] = {
    "gptqmodel": Rival(GPTQMODEL),
    "gptqmodel, mse search": Rival(GPTQMODEL, {"mse": 2.4}),
    "llm-compressor": Rival(LLM_COMPRESSOR, schemes=("w4a16", "w8a8")),
    "autoround": Rival(AUTOROUND, schemes=("w4a16", "w8a8")),
    "autoround, no tuning": Rival(AUTOROUND, {"iters": 0}, ("w4a16", "w8a8")),
}


def ordered(name: str, asked: Asked) -> tuple[Path, list[str], Mapping[str, str]]:
    """Where rival `name` will write, and the command and environment that have it do so.

    Failed where it does not have the scheme, or cannot be installed.
    """
    rival = RIVALS[name]
    if asked.scheme not in rival.schemes:
        raise Failed(f"it has no {asked.scheme}")
    python = _environment(rival.tool, asked.cache, gpu=asked.gpu)
    out = asked.out(name)
    order = {
        "model": str(asked.opened.folder), "out": str(out), "scheme": asked.scheme,
        "group_size": asked.group, "threads": asked.threads, "options": dict(rival.options),
        "rows": asked.rows.input_ids.tolist(),
    }  # fmt: skip
    file = out.with_name(f"{out.name}.order.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(order), "utf-8")
    # -P: this folder's names (serve, lora) are not for them to import.
    script = Path(__file__).with_name(rival.tool.script)
    return out, [str(python), "-P", str(script), str(file)], rival.tool.env


def _environment(tool: Tool, cache: Path, *, gpu: bool) -> Path:
    """The tool's own Python, installed here if it is not yet."""
    folder = cache / f"{tool.package}-{tool.version}"
    python, stamp = folder / "bin" / "python", folder / "complete"
    if stamp.exists():
        return python
    yardstick.say(f"installing {tool.package} {tool.version} into {folder} (minutes, once)")
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    log = folder / "install.log"
    named = f"torch=={tool.torch}"
    # The build without CUDA where an index has it, else any: without a GPU they compute the same.
    small = ([f"{named}+cpu"], ["--index-url", TORCH_CPU, "--retries", "0", named])
    torches = ([named],) if gpu else (*small, [named])
    if not any(_pip(python, wanted, log) for wanted in torches):
        raise Failed(f"{named} could not be installed; {log} says why")
    if not _pip(python, [named, f"{tool.package}=={tool.version}", *tool.beside], log):
        raise Failed(f"{tool.package} could not be installed; {log} says why")
    stamp.touch()
    return python


def _pip(python: Path, wanted: Sequence[str], log: Path) -> bool:
    with log.open("a") as into:
        command = [str(python), "-m", "pip", "install", *wanted]
        return subprocess.run(command, stdout=into, stderr=into, check=False).returncode == 0


def made(out: Path, command: Sequence[str], asked: Asked, env: Mapping[str, str]) -> Cost:
    """What it took to make `out`, now or, where that run came to its end, earlier."""
    note = out.with_name(f"{out.name}.cost.json")
    if note.exists() and not asked.again:
        yardstick.say(f"{out} is there from an earlier run: measuring it again")
        return Cost(**json.loads(note.read_bytes()))
    note.unlink(missing_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    cost = watched(command, asked, out.name, env)
    note.write_text(json.dumps({"seconds": cost.seconds, "peak_bytes": cost.peak_bytes}), "utf-8")
    return cost


def watched(command: Sequence[str], asked: Asked, name: str, env: Mapping[str, str]) -> Cost:
    """Runs it to its end; seconds, and the most memory that it and its children held together."""
    log = asked.cache / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    known = os.environ | dict.fromkeys(threads, str(asked.threads)) | dict(env)
    began, peak = time.monotonic(), 0
    with log.open("w") as into:
        # Some leave logs where they run.
        process = psutil.Popen(list(command), stdout=into, stderr=into, env=known, cwd=log.parent)
        try:
            while process.poll() is None:
                peak = max(peak, _resident(process))
                if time.monotonic() - began > asked.limit:
                    held = f"{peak / 1e9:.2f} GB"
                    raise Failed(f"stopped after {asked.limit:.0f} s, having held {held}")
                time.sleep(SAMPLE_SECONDS)
        finally:
            _end(process)
    if process.returncode:
        lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
        raise Failed(f"{lines[-1][:300] if lines else 'no word'} ({log})")
    return Cost(time.monotonic() - began, peak)


def _resident(process: psutil.Process) -> int:
    total = 0
    for each in (process, *_children(process)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += each.memory_info().rss
    return total


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _end(process: psutil.Popen) -> None:
    for each in (*_children(process), process):
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
