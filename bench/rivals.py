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
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import dequantized, tools, yardstick
from bench.serve import AVX2
from bench.tools import RIVALS, Asked, Cost, Failed
from bench.yardstick import Row, Yardstick
from quant import calibration, formats
from quant.checkpoint import Layer
from quant.intake import source
from quant.recipe import Recipe, choose_group_size
from quant.solver import blocks, grid, int8
from quant.solver.gptq import dequantize

QUANTSERVE = str(Path(sys.executable).with_name("quantserve"))
OURS, ROUNDING = "ours", "plain rounding"


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
            isa=args.isa,
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
    parser = yardstick.parser(__doc__, ["w4a16", "w8a8"], "rivals")
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of the lines that are drawn for calibration")
    add("--only", nargs="+", choices=[OURS, ROUNDING, *RIVALS], help="these, in this order [all]")
    add("--cpus", default="", help="pin everybody to these, as taskset takes them: 0,2-3")
    add("--isa", choices=["auto", "avx2"], default="auto", help="everybody as on an AVX2 machine")
    add("--limit", type=float, default=4 * 3600.0, help="seconds that one run may take")
    add("--again", action="store_true", help="make anew what an earlier run has made")
    return yardstick.arguments(parser)


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
        args.limit, args.cache, args.again, args.isa,
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
    cost = tools.made(out, command, asked, {})
    return _of(cost) | {"bytes": dequantized.size(out), "found": measure.artifact(out)}


def _rival(name: str, asked: Asked, measure: Yardstick) -> dict[str, Any]:
    out, command, env = tools.ordered(name, asked)
    cost = tools.made(out, command, asked, env)
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
