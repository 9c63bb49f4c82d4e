"""What quantizing takes in memory and time, for models of real shapes with random weights.

A model is made here, a tensor at a time, and kept; `quantserve quantize` runs on it in a process of
its own, and the kernel says what that held at most. Beside it stand what was foreseen, and the
floor: a block as it is computed, the Hessian of its widest layer, and the states of both streams
between two blocks.

    python -m bench.memory                          # the 1B shape, whole
    python -m bench.memory --shape 7b --blocks 2    # peak memory does not depend on depth
    python -m bench.memory --rivals gptqmodel llm-compressor
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, LlamaConfig

from bench import tools, yardstick
from quant import calibration, checkpoint, shards
from quant.intake import source
from quant.recipe import Recipe
from quant.solver import blocks, devices, preflight
from quant.solver.preflight import FLOAT, Calibration

QUANTSERVE = str(Path(sys.executable).with_name("quantserve"))
HOST = torch.device("cpu")
SAMPLE_SECONDS = 0.1
GROUP = 128  # inputs that share a scale
SPREAD = 0.02  # of the weights, as models start out
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "1b": {  # Llama-3.2-1B
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256,
        "tie_word_embeddings": True,
    },
    "8b": {  # Llama-3.1-8B
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256,
        "tie_word_embeddings": False,
    },
    "7b": {  # Llama-2-7B
        "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 49_152,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one process: bytes it held at most, seconds on the clock and on all its cores."""

    peak: int
    seconds: float
    cpu_seconds: float


def main() -> None:
    args = arguments(parser(__doc__))
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    folder, texts = prepared(args, HOST)
    log = args.cache / "log.jsonl"
    program = watched([sys.executable, "-c", "import quant.pipeline"], log)
    cost = watched(ours(args, folder, texts), log)
    events = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    foreseen = next(event for event in events if event.get("event") == "estimate")
    least = floor(folder, args.samples, args.length)
    what = {"shape": folder.name, "tokens": f"{args.samples} x {args.length}"}
    print(table(what, (cost, program), foreseen, least))
    for name in args.rivals:
        try:
            took = rival(name, asked(args, folder, texts))
            print(f"{name}: peak {_gb(took.peak_bytes)}, {took.seconds:.0f} s")
        except tools.Failed as fault:
            print(f"{name}: {fault}")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """What every table of models of a shape is asked for."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--shape", choices=list(SHAPES), default="1b")
    add("--blocks", type=int, help="make only so many [all]")
    add("--samples", type=int, default=32, help="calibration rows")
    add("--length", type=int, default=512, help="tokens of each")
    add("--rivals", nargs="*", choices=list(tools.RIVALS), default=[], help="these after ours")
    add("--threads", type=int, default=os.cpu_count() or 1, help="of everybody")
    add("--tokenizer", default=source.DEMO, help="a model whose tokenizer the shape gets")
    add("--limit", type=float, default=4 * 3600.0, help="seconds that a rival may take")
    add("--cache", type=Path, default=Path("~/.cache/quantserve/memory"), help="models and results")
    add("--environments", type=Path, default=Path("~/.cache/quantserve/rivals"),
        help="of the rivals, as `bench.rivals` makes them")  # fmt: skip
    return made


def arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What was asked for, with absolute paths."""
    args = parser.parse_args()
    args.cache, args.environments = (
        path.expanduser().absolute() for path in (args.cache, args.environments)
    )
    return args


def prepared(args: argparse.Namespace, on: torch.device) -> tuple[Path, Path]:
    """The model, whose weights are drawn `on` a device unless it is there, and its texts."""
    folder = args.cache / f"{args.shape}-{args.blocks or 'whole'}"
    settings = dict(SHAPES[args.shape])
    if args.blocks:
        settings["num_hidden_layers"] = args.blocks
    if not (folder / "config.json").exists():
        make(folder, settings, source.open(args.tokenizer).folder, on)
    texts = args.cache / "texts.jsonl"
    letters(texts, args.samples * args.length)
    return folder, texts


def ours(args: argparse.Namespace, folder: Path, texts: Path) -> list[str]:
    """The command that quantizes it."""
    return [
        QUANTSERVE, "quantize", str(folder), "--out", str(args.cache / "made"), "--force",
        "--fresh", "--json", "--group-size", str(GROUP), "--calibration", str(texts),
        "--samples", str(args.samples), "--length", str(args.length),
    ]  # fmt: skip


def asked(args: argparse.Namespace, folder: Path, texts: Path, *, gpu: bool = False) -> tools.Asked:
    """The same of the others, on the same tokens."""
    opened = source.open(str(folder))
    recipe = Recipe(group_size=GROUP, samples=args.samples, length=args.length)
    rows = calibration.prepare(opened, recipe, texts, yardstick.say)
    return tools.Asked(
        opened, "w4a16", GROUP, rows, recipe, texts, args.threads, args.limit, args.environments,
        again=True, gpu=gpu,
    )  # fmt: skip


def rival(name: str, asked: tools.Asked) -> tools.Cost:
    """What it took; what it wrote is thrown away."""
    out, command, env = tools.ordered(name, asked)
    try:
        return tools.watched(command, asked, out.name, env)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def make(
    folder: Path, settings: Mapping[str, Any], tokenizer: Path, on: torch.device = HOST
) -> None:
    """A model of that shape in bfloat16, its norms ones, with another one's tokenizer; its weights
    are drawn `on` a device."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.copy_companions(tokenizer, folder)
    config = LlamaConfig(
        **settings,
        max_position_embeddings=4096,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    draw = torch.Generator(on).manual_seed(0)
    writer = shards.Writer(folder)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        made = torch.ones(weight.shape, device=on)
        if weight.ndim > 1:
            made.normal_(0, SPREAD, generator=draw)
        writer.add(name, made.to(torch.bfloat16).cpu())
    writer.close()
    config.save_pretrained(folder)


def letters(file: Path, tokens: int) -> None:
    """Lines of random letters, of at least so many tokens."""
    draw = random.Random(0)
    lines = ("".join(draw.choices(" abcdefghijklmnopqrstuvwxyz.,()", k=400)) for _ in range(tokens))
    chosen = [
        json.dumps({"text": line}) for line, _ in zip(lines, range(tokens // 64), strict=False)
    ]
    file.write_text("\n".join(chosen), "utf-8")


def watched(command: Sequence[str], log: Path) -> Cost:
    """Runs it to its end, stdout in the log; SystemExit when it fails."""
    began, peak = time.monotonic(), 0
    with log.open("w", encoding="utf-8") as into:
        process = subprocess.Popen(command, stdout=into)
    # The kernel's own record, but for the last moment; what wait4 tells counts us in, who forked.
    while not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        peak = max(peak, _most_resident(process.pid))
        time.sleep(SAMPLE_SECONDS)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command[:2])} failed; {log} says why")
    return Cost(peak, time.monotonic() - began, used.ru_utime + used.ru_stime)


def _most_resident(pid: int) -> int:
    """Bytes that a process has held at most; 0 when it has just ended."""
    lines = Path(f"/proc/{pid}/status").read_text("ascii").splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), 0)


def floor(folder: Path, samples: int, length: int) -> dict[str, int]:
    """Bytes that a run cannot do without, whatever it is written in."""
    opened = source.open(str(folder))
    units = preflight.units(blocks.skeleton(opened, HOST).shapes())
    dtype = devices.forward_dtype(HOST, exact=False)
    given = Calibration(samples, length, opened.config.hidden_size, dtype)
    return {
        "block": max(dtype.itemsize * sum(unit.weights for unit in block) for block in units),
        "Hessian": max(FLOAT * unit.columns**2 for block in units for unit in block),
        "states": 2 * given.states,
    }


def table(
    what: Mapping[str, str],
    costs: tuple[Cost, Cost],
    foreseen: Mapping[str, float],
    least: Mapping[str, int],
) -> str:
    """Of a run: what it took beside the imports alone, what was foreseen, and the floor."""
    cost, imports = costs
    total = sum(least.values())
    row = {
        **what,
        "peak": _gb(cost.peak),
        "foreseen": _gb(foreseen["memory"]),
        "imports alone": _gb(imports.peak),
        "floor": f"{_gb(total)} ({', '.join(f'{name} {_gb(n)}' for name, n in least.items())})",
        "peak beyond imports / floor": f"{(cost.peak - imports.peak) / total:.2f}",
        "time": f"{cost.seconds:.0f} s ({cost.cpu_seconds:.0f} s of CPU)",
        "foreseen time": f"{foreseen['seconds']:.0f} s",
    }
    work = f"{foreseen['operations'] / 1e12:.1f}e12 multiply-adds, {foreseen['speed'] / 1e9:.1f}e9"
    lines = [" | ".join(row), " | ".join(["---"] * len(row)), " | ".join(row.values())]
    return "\n".join([*(f"| {line} |" for line in lines), "", f"{work} a second here"])


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


if __name__ == "__main__":
    main()
