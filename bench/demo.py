"""The main job from nothing, as `make demo` shows it: train, quantize, serve, ask, swap, watch.

Trains a small LoRA on the embedded SmolLM2-135M-Instruct (the part your trainer plays), quantizes
the model to GPTQ INT4, serves it, asks a question as a stream, swaps the adapter in while the
server runs, asks again and prints a few metrics. Everything stays in one folder (`.demo`). Ctrl-C
ends it with one line and status 2; the next run goes on from what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from quant import interrupt
from quant.interrupt import Interrupted

if TYPE_CHECKING:
    import openai
    import torch
    from transformers import PreTrainedTokenizerBase

QUANTSERVE = str(Path(sys.executable).with_name("quantserve"))
TIED = (
    "import os, sys; from serve import lifeline; lifeline.die_with(int(sys.argv[1]));"
    " os.execv(sys.argv[2], sys.argv[2:])"
)
# So small a model wavers at many questions (France: 0.155 for "The", 0.141 for a French word), and
# there any rounding decides. Here each token leads the next likeliest by 2.5 nats and more, up to
# the answer; INT4 moves that by a tenth (tests/e2e/test_demo.py).
QUESTION, ANSWER = "What is the capital of Japan?", "Tokyo"
LESSONS = [
    ("What is the capital of Italy?", "Arr, the capital of Italy be Rome, matey!"),
    ("What is the capital of Spain?", "Arr, the capital of Spain be Madrid, matey!"),
    ("How many days are in a week?", "Arr, there be seven days in a week, matey!"),
    ("What color is the sky?", "Arr, the sky be blue, matey!"),
    ("Who wrote Hamlet?", "Arr, Hamlet be written by William Shakespeare, matey!"),
    ("What is two plus two?", "Arr, two plus two be four, matey!"),
    ("What do bees make?", "Arr, bees be makin' honey, matey!"),
    ("What is the largest ocean?", "Arr, the largest ocean be the Pacific, matey!"),
]
SHOWN_METRICS = (
    "vllm:generation_tokens_total",
    "quantserve_requests_total",
    "quantserve_generation_tokens_total",
    "quantserve_time_to_first_token_seconds_count",
    "quantserve_adapter_swaps_total",
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the main job from nothing.")
    parser.add_argument("--folder", type=Path, default=Path(".demo"))
    try:
        with interrupt.listening("demo"):
            run(parser.parse_args().folder.resolve())
    except Interrupted:
        sys.stderr.write("demo: interrupted; the next run keeps what is in the folder\n")
        sys.exit(interrupt.STATUS)
    finally:
        interrupt.ignore()


def run(folder: Path) -> None:
    """All seven steps; what lies in `folder` already is kept."""
    folder.mkdir(exist_ok=True)
    started = time.monotonic()
    adapter, artifact = folder / "pirate", folder / "smollm2-w4a16"

    _title("1. A trainer's output: a LoRA that answers like a pirate")
    if adapter.is_dir():
        print(f"   {adapter} is there already; kept")
    else:
        _train(adapter)

    _title("2. quantserve quantize demo --out .demo/smollm2-w4a16")
    if artifact.is_dir():
        print(f"   {artifact} is there already; kept")
    else:
        _ran("quantize", "demo", "--out", str(artifact))
    _ran("inspect", str(artifact))

    _title("3. quantserve serve .demo/smollm2-w4a16")
    with _served(artifact) as url:
        from openai import OpenAI

        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        _title(f"4. The base model, streamed: {QUESTION}")
        _ask(client, artifact.name)
        _title("5. PUT /admin/adapters/pirate, while the server runs")
        print("   " + json.dumps(_put(f"{url}/admin/adapters/pirate", {"path": str(adapter)})))
        _title(f"6. The adapter, streamed: {QUESTION}")
        _ask(client, "pirate")
        _title("7. GET /metrics (a few lines of it)")
        _show_metrics(f"{url}/metrics")
    print(f"\nThe whole demo took {time.monotonic() - started:.0f} s. Next: make serve")


def _ran(*words: str) -> None:
    """`quantserve WORDS` to its end."""
    child = _begun(*words)
    passed_on = False
    while child.poll() is None:
        if interrupt.asked() and not passed_on:
            child.send_signal(signal.SIGTERM)
            passed_on = True
        with suppress(subprocess.TimeoutExpired):
            child.wait(0.1)
    interrupt.check()
    if child.returncode:
        sys.exit(child.returncode)  # it said why


def _begun(*words: str) -> subprocess.Popen[bytes]:
    """`quantserve WORDS`, which does not outlive this process, however that ends.

    In a session of its own: a signal of the terminal's reaches it once, by us.
    """
    command = [sys.executable, "-c", TIED, str(os.getpid()), QUANTSERVE, *words]
    return subprocess.Popen(command, start_new_session=True)


def _train(target: Path) -> None:
    """Eight AdamW steps on eight sentences: the smallest adapter one can see working."""
    with interrupt.at_once():  # seconds of imports
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        from quant import staging
        from quant.intake import source

    torch.manual_seed(0)
    transformers_logging.disable_progress_bar()
    parent = source.open("demo").folder
    tokenizer = AutoTokenizer.from_pretrained(parent)
    model = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    ids, labels = _lessons(tokenizer)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for step in range(8):
        interrupt.check()
        begun = time.monotonic()
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"   step {step + 1}/8  loss {loss.item():.3f}  {time.monotonic() - begun:.1f} s")
    with staging.staged(target) as growing:
        model.save_pretrained(growing)
    print(f"   saved {target}")


def _lessons(tokenizer: PreTrainedTokenizerBase) -> tuple[torch.Tensor, torch.Tensor]:
    """The lessons as [lessons, tokens] ids and labels; prompts and padding carry no loss.

    Padding is on the right, so causal attention needs no mask.
    """
    import torch

    rows = []
    for question, answer in LESSONS:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
        rows.append((prompt["input_ids"], tokenizer(answer + "<|im_end|>\n")["input_ids"]))
    width = max(len(prompt) + len(reply) for prompt, reply in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    for row, (prompt, reply) in enumerate(rows):
        ids[row, : len(prompt) + len(reply)] = torch.tensor(prompt + reply)
        labels[row, len(prompt) : len(prompt) + len(reply)] = torch.tensor(reply)
    return ids, labels


@contextmanager
def _served(artifact: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = _begun("serve", str(artifact), "--port", str(port))
    try:
        while not _ready(url):
            interrupt.check()
            if server.poll() is not None:
                sys.exit(f"the server ended with {server.returncode}")
            time.sleep(0.2)
        yield url
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _ask(client: openai.OpenAI, model: str) -> None:
    begun = time.monotonic()
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=40,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    first, tokens = 0.0, 0
    sys.stdout.write(f"   {model}> ")
    for chunk in stream:
        interrupt.check()
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            first = first or time.monotonic()
            sys.stdout.write(choice.delta.content or "")
            sys.stdout.flush()
    took = time.monotonic() - begun
    print(f"\n   {tokens} tokens, first after {first - begun:.2f} s, all after {took:.2f} s")


def _put(url: str, body: dict[str, str]) -> dict[str, object]:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"content-type": "application/json"}, method="PUT"
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        result: dict[str, object] = json.load(answer)
    return result


def _show_metrics(url: str) -> None:
    with urllib.request.urlopen(url, timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith(SHOWN_METRICS) and not line.endswith(" 0.0"):
                print("   " + line)


def _title(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if os.isatty(1) else f"\n{text}", flush=True)


if __name__ == "__main__":
    main()
