"""Swap or merge, and what `adapter export --compensate` gains: a LoRA trained on GSM8K.

Trains the adapter (minutes on two cores), quantizes the model where there is no artifact yet, and
holds the adapter beside it, plain and compensated, and with --merged an artifact that it was merged
into, against the 16-bit pair on questions that neither trained nor calibrated anything. --latency
times a server of each. GSM8K is a file of {"question", "answer"} lines that you give;
its first lines train, the next calibrate, the last measure.

    python -m bench.rotated demo --out rotated
    python -m bench.compensate --model rotated --gsm8k train.jsonl --calibration calib.jsonl
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from quant import bar, pipeline
from quant.intake import source
from quant.lora import export
from quant.lora.compensate import Compensation
from quant.proof import compare, ways
from quant.proof.ways import Way
from quant.recipe import Draw, Recipe

RANK, BATCH, RATE, WARM = 8, 4, 1e-3, 10
LONGEST = 192  # tokens of what trains


def main(words: Sequence[str] | None = None) -> None:
    args = _asked(words)
    args.out.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in args.gsm8k.read_text("utf-8").splitlines()]
    parent = source.open(args.model).folder
    adapter, artifact = args.out / "adapter", args.artifact or args.out / "artifact"
    if not adapter.is_dir():
        train(parent, lines, args.steps, adapter)
    _quantized(args, artifact)
    merged = args.out / "merged" if args.merged else None
    if merged is not None:
        _quantized(args, merged, adapter)
    rest = lines[args.steps * BATCH :]
    texts = _chats(args.out / "domain.jsonl", rest[: len(rest) // 2])
    exam = _chats(args.out / "exam.jsonl", rest[len(rest) // 2 :])
    ready = []
    for rank in args.ranks:
        began, target = time.monotonic(), args.out / f"plus-{rank}"
        rows = Recipe(samples=args.samples, length=256)
        more = Compensation(rank, args.model, rows, texts)
        if not target.is_dir():
            with bar.Bar("blocks") as shown:
                export.run(export.Order(adapter, artifact, target, compensation=more), shown)
            print(f"+{rank}: {time.monotonic() - began:.0f} s", flush=True)
        ready.append(target)
    asked = compare.Order(args.model, artifact, (adapter,), calibration=exam)
    draw = Draw(windows=args.windows, length=256)
    with bar.Bar("windows") as shown:
        order = ways.Order(asked, tuple(ready), merged, latency=args.latency)
        found = ways.run(draw, order, shown)
    _table(found)


def _asked(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model", default="demo", help="the full-precision parent")
    add("--gsm8k", type=Path, required=True, help="JSONL of GSM8K's training questions")
    add("--artifact", type=Path, help="of the model [OUT/artifact, made when it is not there]")
    add("--scheme", choices=["w4a16", "w8a16", "w8a8"], default="w4a16")
    add("--group-size", type=int)
    add("--calibration", type=Path, help="what the artifact is calibrated on [self-written]")
    add("--out", type=Path, default=Path("compensated"), help="what is made, and kept")
    add("--steps", type=int, default=60, help="of training, four questions each")
    add("--ranks", type=int, nargs="+", default=[8], help="of the compensation")
    add("--samples", type=int, default=48, help="rows of 256 tokens that calibrate it")
    add("--windows", type=int, default=16, help="of 256 tokens that measure")
    add("--merged", action="store_true", help="an artifact with the adapter merged, too")
    add("--latency", action="store_true", help="time a server of each way")
    return parser.parse_args(words)


def _quantized(args: argparse.Namespace, target: Path, *adapters: Path) -> None:
    """The model with these merged, unless it is there already."""
    if target.is_dir():
        return
    recipe = Recipe(scheme=args.scheme, group_size=args.group_size, samples=32, length=512)
    order = pipeline.Order(args.model, target, adapters, calibration_file=args.calibration)
    with bar.Bar("layers") as shown:
        pipeline.run(recipe, order, shown)


def train(parent: Path, lines: Sequence[dict[str, str]], steps: int, target: Path) -> None:
    """A LoRA of rank 8 on every linear layer, one pass over the first lines."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(parent)
    model = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32)
    model = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    )
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / WARM) * (1 - step / steps)
        ids, labels = _lessons(tokenizer, lines[step * BATCH : (step + 1) * BATCH])
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}/{steps}  loss {loss.item():.3f}", flush=True)
    model.save_pretrained(target)


def _lessons(tokenizer: Any, lines: Sequence[dict[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels [lines, tokens]; questions and padding, on the right, carry no loss."""
    rows = []
    for line in lines:
        asked = [{"role": "user", "content": line["question"]}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)
        reply = tokenizer(line["answer"] + "<|im_end|>\n")["input_ids"]
        rows.append((prompt["input_ids"][:LONGEST], reply))
    width = min(LONGEST, max(len(prompt) + len(reply) for prompt, reply in rows))
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    for row, (prompt, reply) in enumerate(rows):
        both = torch.tensor([*prompt, *reply])[:width]
        ids[row, : len(both)] = both
        labels[row, len(prompt) : len(both)] = both[len(prompt) :]
    return ids, labels


def _chats(path: Path, lines: Sequence[dict[str, str]]) -> Path:
    """The lines as chats, as a calibration file has them."""
    chats = (
        [{"role": "user", "content": line["question"]},
         {"role": "assistant", "content": line["answer"]}]
        for line in lines
    )  # fmt: skip
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), "utf-8")
    return path


def _table(found: Sequence[Way]) -> None:
    head = ["way", "MB, one adapter", "each further", "mean KL, nats", "of the plain one's",
            "same likeliest token"]  # fmt: skip
    if found[0].latency:
        head += ["first token, ms", "each further, ms", "tokens/s"]
    print(f"| {' | '.join(head)} |")
    print(f"|{'---|' * len(head)}")
    plain = found[0].text
    assert plain is not None
    for way in found:
        print(f"| {' | '.join(_row(way, plain.mean_kl.value))} |")


def _row(way: Way, plain: float) -> list[str]:
    text, timed = way.text, way.latency
    assert text is not None
    kl = text.mean_kl
    row = [
        Path(way.name).name,
        f"{way.bytes / 1e6:.1f}",
        f"{way.bytes_more / 1e6:.1f}",
        f"{kl.value:.4f} ({kl.low:.4f} .. {kl.high:.4f})",
        f"{kl.value / plain:.2f}",
        f"{text.top1_agreement.value:.1%}",
    ]
    if timed:
        row += [f"{timed.first_token_ms:.0f}", f"{timed.next_token_ms:.1f}"]
        row.append(f"{timed.tokens_per_s:.1f}")
    return row


if __name__ == "__main__":
    main()
