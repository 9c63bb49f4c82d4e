"""AutoRound on given tokens, run by `bench.rivals` in AutoRound's own environment.

Its defaults (200 steps of sign descent a block) but for `options`, written as AutoGPTQ (W4A16) or
compressed-tensors (W8A8).
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound


def main(order: dict[str, Any]) -> None:
    torch.set_num_threads(order["threads"])
    rows = [torch.tensor([row]) for row in order["rows"]]
    grouped = {"group_size": order["group_size"]} if order["scheme"] == "w4a16" else {}
    tuner = AutoRound(
        order["model"],
        scheme="W4A16" if order["scheme"] == "w4a16" else "INT8",
        dataset=rows,
        nsamples=len(rows),
        seqlen=max(row.shape[1] for row in rows),
        device_map="cpu",
        **grouped,
        **order["options"],
    )
    form = "auto_gptq" if order["scheme"] == "w4a16" else "llm_compressor"
    # It names a folder of its own inside the one it is given.
    with tempfile.TemporaryDirectory(dir=Path(order["out"]).parent) as inside:
        tuner.quantize_and_save(inside, format=form)
        (made,) = {file.parent for file in Path(inside).rglob("config.json")}
        made.rename(order["out"])


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_bytes()))
