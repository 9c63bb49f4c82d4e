"""GPTQModel on given tokens, run by `bench.rivals` in GPTQModel's own environment.

Its defaults, but for `options`, with the parent's dtype. Its pool wants two CPU workers for loading
and takes half the cores for all of them: `bench.rivals` sets GPTQMODEL_CPU_WORKERS=2.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQConfig, GPTQModel


def main(order: dict[str, Any]) -> None:
    torch.set_num_threads(order["threads"])
    bits = 4 if order["scheme"] == "w4a16" else 8
    config = GPTQConfig(bits=bits, group_size=order["group_size"], **order["options"])
    model = GPTQModel.load(order["model"], config)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in order["rows"]]
    model.quantize(rows, batch_size=1, backend=BACKEND.AUTO)
    model.save(order["out"])


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_bytes()))
