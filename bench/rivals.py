"""Ours beside GPTQModel, llm-compressor and AutoRound: time, memory, bytes, and what was lost.

Each rival lives in a virtual environment of its own, made here on first use from pinned versions,
and gets exactly the calibration tokens that ours gets. What it writes is dequantized here and
measured as ours is, by `quant.proof.fidelity` in float32: W8A8 inputs are rounded as vLLM's int8
kernels do. Everybody runs after the other, on the same cores and threads.

    python -m bench.rivals --model demo --calibration calib.jsonl --text held-out.txt
    python -m bench.rivals ... --scheme w8a8 --only ours llm-compressor --threads 1 --cpus 0
    python -m bench.rivals --table            # what earlier runs found
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from bench import dequantized, yardstick
from bench.serve import AVX2
from bench.yardstick import Row, Yardstick
from quant import calibration, formats
from quant.checkpoint import Layer
from quant.intake import source
from quant.intake.source import Source
from quant.recipe import Recipe, Scheme, choose_group_size
from quant.solver import blocks, grid, int8
from quant.solver.gptq import dequantize

QUANTSERVE = str(Path(sys.executable).with_name("quantserve"))
OURS, ROUNDING = "ours", "plain rounding"
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

    def out(self, name: str) -> Path:
        """Where this contender's checkpoint goes."""
        order = (name, self.opened.folder.name, self.scheme, self.group, self.threads,
                 self.rows.report.digest[:12])  # fmt: skip
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


def main() -> None:
    args = _arguments()
    if args.isa == "avx2" and not AVX2.items() <= os.environ.items():
        command = [sys.executable, "-m", "bench.rivals", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **AVX2})
    if not args.table:
        if args.cpus:
            os.sched_setaffinity(0, cpus(args.cpus))
        torch.set_num_threads(args.threads)
        _run(args)
    for line in yardstick.tables(yardstick.kept(args.results), OURS):
        print(line)


def _run(args: argparse.Namespace) -> None:
    asked = _asked(args)
    windows = Recipe(samples=args.windows, length=args.length)
    measure = Yardstick(asked.opened, args.text, windows, args.calibration, *args.apart)
    able = [name for name, rival in RIVALS.items() if args.scheme in rival.schemes]
    for name in args.only or [OURS, *able, ROUNDING]:
        facts = Row(
            name=name,
            version=version("quantserve")
            if name in (OURS, ROUNDING)
            else RIVALS[name].tool.version,
            model=Path(args.model).name,
            scheme=args.scheme,
            group_size=asked.group,
            seed=args.seed,
            calibration=asked.rows.report.digest,
            threads=args.threads,
            cpus=args.cpus,
            when=datetime.now(UTC),
        )
        yardstick.say(f"{name}: {facts.setting}")
        try:
            found = CONTENDERS.get(name, _rival)(name, asked, measure)
        except Failed as fault:
            yardstick.say(f"{name}: failed: {fault}")
            found = {"failure": str(fault)}
        yardstick.keep(args.results, facts.model_copy(update=found))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="demo", help="the full-precision parent, or `demo`")
    add("--scheme", choices=["w4a16", "w8a8"], default="w4a16")
    add("--group-size", type=int, help="inputs that share a scale [the largest that fits]")
    add("--calibration", type=Path, help='JSONL of {"text"} or {"messages"} lines')
    add("--samples", type=int, default=32, help="calibration rows")
    add("--length", type=int, default=512, help="tokens of each, and of each window")
    add("--seed", type=int, default=0, help="of the lines that are drawn for calibration")
    add("--text", type=Path, help="UTF-8 text to measure on, where it calibrates nothing")
    add("--apart", type=Path, nargs="+", default=[],
        help="and shares no passage with these calibration files either")  # fmt: skip
    add("--windows", type=int, default=32, help="windows of it")
    add("--only", nargs="+", choices=[OURS, ROUNDING, *RIVALS], help="these, in this order [all]")
    add("--threads", type=int, default=os.cpu_count() or 1, help="of everybody")
    add("--cpus", default="", help="pin everybody to these, as taskset takes them: 0,2-3")
    add("--isa", choices=["auto", "avx2"], default="auto", help="everybody as on an AVX2 machine")
    add("--limit", type=float, default=4 * 3600.0, help="seconds that one run may take")
    add("--again", action="store_true", help="make anew what an earlier run has made")
    add("--cache", type=Path, default=Path("~/.cache/quantserve/rivals"),
        help="environments, logs and what was made")  # fmt: skip
    add("--results", type=Path, help="the ledger [CACHE/results.jsonl]")
    add("--table", action="store_true", help="run nothing, print the ledger")
    args = parser.parse_args()
    args.cache = args.cache.expanduser().absolute()
    args.results = args.results or args.cache / "results.jsonl"
    if not args.table and (args.calibration is None or args.text is None):
        parser.error("--calibration and --text are needed")
    return args


def _asked(args: argparse.Namespace) -> Asked:
    opened = source.open(args.model)
    group = None if args.scheme == "w8a8" else args.group_size
    recipe = Recipe(
        scheme=args.scheme, group_size=group, samples=args.samples, length=args.length,
        seed=args.seed,
    )  # fmt: skip
    rows = calibration.prepare(opened, recipe, args.calibration, yardstick.say)
    assert bool(rows.mask.all()), "rivals get whole rows: a longer calibration file is needed"
    shapes = blocks.skeleton(opened, yardstick.HOST).shapes()
    group = choose_group_size(recipe, (columns for _, columns in shapes.values()))
    return Asked(
        opened, args.scheme, group, rows, recipe, args.calibration.absolute(), args.threads,
        args.limit, args.cache, args.again,
    )  # fmt: skip


def _ours(_name: str, asked: Asked, measure: Yardstick) -> dict[str, Any]:
    out, recipe = asked.out(OURS), asked.recipe
    sized = [] if asked.scheme == "w8a8" else ["--group-size", str(asked.group)]
    command = [
        QUANTSERVE, "quantize", asked.opened.spec, "--out", str(out), "--force", "--json",
        "--scheme", asked.scheme, *sized, "--calibration", str(asked.calibration),
        "--samples", str(recipe.samples), "--length", str(recipe.length),
        "--seed", str(recipe.seed),
    ]  # fmt: skip
    cost = made(out, command, asked, {})
    return _of(cost) | {"bytes": dequantized.size(out), "found": measure.artifact(out)}


def _rival(name: str, asked: Asked, measure: Yardstick) -> dict[str, Any]:
    rival = RIVALS[name]
    if asked.scheme not in rival.schemes:
        raise Failed(f"it has no {asked.scheme}")
    python = _environment(rival.tool, asked.cache)
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
    command = [str(python), "-P", str(Path(__file__).with_name(rival.tool.script)), str(file)]
    cost = made(out, command, asked, rival.tool.env)
    try:
        rounded = dequantized.quantized(out) if dequantized.rounds_inputs(out) else []
        if bool(rounded) != (asked.scheme == "w8a8"):
            raise Failed(f"it was asked for {asked.scheme} and wrote another scheme")
        found = measure.weights(dequantized.tensors(out), rounded, str(out))
    except (OSError, KeyError, dequantized.UnknownFormat) as fault:
        raise Failed(f"what it wrote cannot be read: {fault}") from fault
    return _of(cost) | {"bytes": dequantized.size(out), "found": found}


def _rounding(_name: str, asked: Asked, measure: Yardstick) -> dict[str, Any]:
    shapes = blocks.skeleton(asked.opened, yardstick.HOST).shapes()
    levels = (
        int8.CHANNEL
        if asked.scheme == "w8a8"
        else grid.full_range(asked.recipe.bits, asked.opened.dtype)
    )
    form, bytes_after = formats.of_scheme(asked.scheme, asked.group), 0

    def rounded() -> Iterator[tuple[str, Tensor]]:
        nonlocal bytes_after
        for name in asked.opened.tensors.names():
            tensor, module = asked.opened.tensors.get(name), name.removesuffix(".weight")
            if module not in shapes:
                bytes_after += tensor.nbytes
                yield name, tensor
                continue
            layer = nearest(tensor.float(), asked.group, levels)
            bytes_after += form.stored(shapes[module])
            yield name, dequantize(layer.codes, layer.scale)

    found = measure.weights(rounded(), shapes if asked.scheme == "w8a8" else (), ROUNDING)
    return {"bytes": bytes_after, "found": found}


CONTENDERS = {OURS: _ours, ROUNDING: _rounding}


def nearest(weight: Tensor, group: int, levels: grid.Levels) -> Layer:
    """Every weight to the nearest level of the scale that just holds its group's largest."""
    grouped = weight.reshape(-1, group if group > 0 else weight.shape[1])
    scale = levels.stored(grid.largest_fits(grouped, levels))
    codes = grid.to_steps(grouped, scale, levels).to(torch.int8).view(weight.shape)
    return Layer(codes, scale.view(weight.shape[0], -1))


def _environment(tool: Tool, cache: Path) -> Path:
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
    torches = ([f"{named}+cpu"], ["--index-url", TORCH_CPU, "--retries", "0", named], [named])
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
        process = psutil.Popen(list(command), stdout=into, stderr=into, env=known)
        try:
            while process.poll() is None:
                peak = max(peak, _resident(process))
                if time.monotonic() - began > asked.limit:
                    raise Failed(f"stopped after {asked.limit:.0f} s")
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


def _of(cost: Cost) -> dict[str, Any]:
    return {"seconds": round(cost.seconds, 1), "peak_bytes": cost.peak_bytes}


def cpus(text: str) -> set[int]:
    """ "0,2-3" -> {0, 2, 3}."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


if __name__ == "__main__":
    main()
