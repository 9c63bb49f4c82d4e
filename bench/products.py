"""A block's solving beside its matrix products alone, at this machine's own float32 rate.

The products that no GPTQ with such targets goes without: both streams through the block, for each
input a symmetric Hessian and a full cross moment, one more with the stream's gap where a layer
adds to it, the factorization, and each column's error fed to the later ones. Their multiply-adds
are counted from shapes; the rate is that of large square products, the best of a few before and
after each block. Seconds are the processor's, of all threads together over their number: what else
the machine does is not in them, waiting for each other is.

    python -m bench.products --model demo --calibration calib.jsonl --threads 2
    python -m bench.products ... --isa avx2    # as an AVX2 machine
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.quality import Quiet
from bench.serve import AVX2
from quant import calibration
from quant.intake import source
from quant.recipe import Recipe
from quant.solver import allotment, blocks, devices, heap, preflight, walk
from quant.solver.layers import Layers, half
from quant.solver.preflight import Calibration, Operations, Unit

HOST = torch.device("cpu")
MAY = 1.4  # times the products alone


@dataclass(frozen=True, slots=True)
class Timed:
    """One block: seconds, and multiply-adds a second around it."""

    seconds: float
    rate: float


def main() -> None:
    args = _arguments()
    wanted = {"OMP_WAIT_POLICY": "passive"} | (AVX2 if args.isa == "avx2" else {})
    if not wanted.items() <= os.environ.items():  # as `quantserve quantize` starts
        command = [sys.executable, "-m", "bench.products", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **wanted})
    torch.set_num_threads(args.threads)
    heap.share()
    recipe = Recipe(scheme=args.scheme, group_size=args.group_size, samples=args.samples,
                    length=args.length)  # fmt: skip
    dtype = devices.forward_dtype(HOST, exact=args.exact)
    decoder = blocks.skeleton(opened := source.open(args.model), HOST, dtype)
    given = Calibration(args.samples, args.length, opened.config.get_text_config().hidden_size)
    needed = least(preflight.units(decoder.shapes())[0], given).total
    timed = list(_blocks(args, recipe, opened, decoder))
    for line in _table(needed, timed, args.threads):
        print(line)
    ratio = statistics.median(each.seconds * each.rate / needed for each in timed)
    if ratio > MAY:
        sys.exit(f"{ratio:.2f} times the products alone; at most {MAY} is claimed")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="demo", help="what `quantserve quantize` takes")
    add("--scheme", choices=["w4a16", "w8a16", "w8a8"], default="w4a16")
    add("--group-size", type=int, help="inputs that share a scale [the largest that fits]")
    add("--calibration", type=Path, required=True, help='JSONL of {"text"} or {"messages"} lines')
    add("--samples", type=int, default=32, help="calibration rows")
    add("--length", type=int, default=512, help="tokens of each")
    add("--blocks", type=int, default=6, help="that are timed, after one that warms up")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--exact", action="store_true", help="forwards and their sums in float32")
    add("--isa", choices=["auto", "avx2"], default="auto")
    return parser.parse_args()


def least(units: Sequence[Unit], given: Calibration) -> Operations:
    """Multiply-adds of a block's products, as few as they can be."""
    attention = given.length * given.width  # scores and values, causal
    forwards = 2 * given.tokens * (sum(unit.weights for unit in units) + attention)
    moments = given.tokens * sum(
        unit.columns * (unit.columns + 1) // 2
        + min(unit.columns**2, 2 * unit.weights)  # the drift's, or what that asks of the outputs
        + unit.adds(given) * unit.weights
        for unit in units
    )
    solving = sum((unit.rows + unit.columns) * unit.columns**2 for unit in units)
    return Operations(forwards, moments, solving)


def _blocks(
    args: argparse.Namespace, recipe: Recipe, opened: source.Source, decoder: blocks.Decoder
) -> Iterator[Timed]:
    plan = allotment.bound(recipe, decoder.shapes())
    layers = Layers(recipe, plan, half(opened), decoder.shapes(), Quiet())
    rows = calibration.prepare(opened, recipe, args.calibration, source.quiet)
    size = max(1, preflight.STREAM_TOKENS["cpu"] // rows.input_ids.shape[1])
    batches = zip(torch.split(rows.input_ids, size), torch.split(rows.mask, size), strict=True)
    streams = blocks.embed(decoder, opened, list(batches))
    for place in range(args.blocks + 1):
        before = preflight.speed(HOST)
        began = time.process_time()
        walk.run(decoder, place, opened, streams, layers)
        seconds = (time.process_time() - began) / args.threads
        if place:  # the first compiles its loops
            yield Timed(seconds, max(before, preflight.speed(HOST)))


def _table(needed: int, timed: list[Timed], threads: int) -> Iterator[str]:
    yield f"{2 * needed / 1e9:.0f} GFLOP of products a block, {threads} threads"
    yield ""
    yield "| block | seconds | rate, GFLOP/s | products alone | ratio |"
    yield "|---|---|---|---|---|"
    for place, each in enumerate(timed, 1):
        alone = needed / each.rate
        yield (
            f"| {place} | {each.seconds:.2f} | {2 * each.rate / 1e9:.0f} | {alone:.2f} s "
            f"| {each.seconds / alone:.2f} |"
        )


if __name__ == "__main__":
    main()
