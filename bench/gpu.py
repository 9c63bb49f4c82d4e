"""Quantizing a model of a real shape with random weights on one GPU: seconds and memory.

Ours and others, each in a process of its own, on the same tokens; memory is what the GPU has less
free than before. Beside them stand the products that no GPTQ with such targets goes without (see
`bench.products`), forwards and moments at this GPU's own bfloat16 rate, solving at its float32
rate.

    python -m bench.gpu                                  # the 8B shape, whole
    python -m bench.gpu --blocks 4 --rivals llm-compressor
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bench import memory, products, tools, yardstick
from quant.intake import source
from quant.solver import blocks, preflight
from quant.solver.preflight import Calibration, Operations

GPU = torch.device("cuda")
SIDE, TIMES = 8192, 10  # of the products that tell the rates


@dataclass(slots=True)
class Held:
    """Bytes of the GPU that others than us came to hold."""

    peak: int = 0


def main() -> None:
    args = memory.arguments(_parser())
    folder, texts = memory.prepared(args, GPU)
    rates = rate(torch.bfloat16), rate(torch.float32)
    least = floor(folder, args.samples, args.length)
    alone = (least.forwards + least.moments) / rates[0] + least.solving / rates[1]
    yardstick.say(
        f"{torch.cuda.get_device_name()}: {2e-12 * rates[0]:.0f} TFLOP/s in bfloat16,"
        f" {2e-12 * rates[1]:.0f} in float32; {2e-12 * least.total:.0f} TFLOP of products alone"
    )
    print(f"| {folder.name}, {args.samples} x {args.length} tokens | time | of the products alone"
          " | GPU memory | host memory |\n|---|---|---|---|---|")  # fmt: skip
    print(f"| the products alone | {alone:.1f} s | 1 | | |")
    for name, run in _contenders(args, folder, texts):
        with watching() as held:
            try:
                cost = run()
            except tools.Failed as fault:
                print(f"| {name} | {fault}, {_gb(held.peak)} of the GPU | | | |")
                continue
        row = (name, f"{cost.seconds:.0f} s", f"{cost.seconds / alone:.1f}",
               _gb(held.peak), _gb(cost.peak_bytes))  # fmt: skip
        print(f"| {' | '.join(row)} |", flush=True)


def _parser() -> argparse.ArgumentParser:
    made = memory.parser(__doc__)
    apart = Path("~/.cache/quantserve/rivals-gpu")  # their torch is another one there
    made.set_defaults(shape="8b", samples=128, length=2048, environments=apart)
    return made


def _contenders(
    args: argparse.Namespace, folder: Path, texts: Path
) -> Iterator[tuple[str, Callable[[], tools.Cost]]]:
    asked = memory.asked(args, folder, texts, gpu=True)
    ours = [*memory.ours(args, folder, texts), "--device", "cuda"]
    yield "quantserve", lambda: tools.watched(ours, asked, "ours", {})
    for name in args.rivals:
        yield name, partial(memory.rival, name, asked)


@contextmanager
def watching() -> Iterator[Held]:
    """How much less of the GPU is free meanwhile."""
    held, ended = Held(), threading.Event()
    before, _ = torch.cuda.mem_get_info(GPU)

    def watch() -> None:
        while not ended.wait(memory.SAMPLE_SECONDS):
            held.peak = max(held.peak, before - torch.cuda.mem_get_info(GPU)[0])

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield held
    finally:
        ended.set()
        thread.join()


def rate(dtype: torch.dtype) -> float:
    """Multiply-adds a second of large products of random numbers, the best of a few."""
    factor = torch.randn(SIDE, SIDE, device=GPU).to(dtype)
    best = 0.0
    for _ in range(TIMES):
        torch.cuda.synchronize()
        began = time.perf_counter()
        factor @ factor
        torch.cuda.synchronize()
        best = max(best, SIDE**3 / (time.perf_counter() - began))
    torch.cuda.empty_cache()
    return best


def floor(folder: Path, samples: int, length: int) -> Operations:
    """Of all blocks."""
    opened = source.open(str(folder))
    given = Calibration(samples, length, opened.config.hidden_size, torch.bfloat16)
    units = preflight.units(blocks.skeleton(opened, memory.HOST).shapes())
    each = [products.least(block, given) for block in units]
    return Operations(
        *(sum(getattr(one, part) for one in each) for part in ("forwards", "moments", "solving"))
    )


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


if __name__ == "__main__":
    main()
