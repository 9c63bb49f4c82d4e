"""llm-compressor on given tokens, run by `bench.rivals` in llm-compressor's own environment.

W4A16 is its W4A16 preset with the group size asked for under GPTQModifier; W8A8 is its W8A8 preset
after SmoothQuantModifier(0.8), as its own example has it. Everything else is its default.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(order: dict[str, Any]) -> None:
    torch.set_num_threads(order["threads"])
    rows: list[list[int]] = order["rows"]
    model = AutoModelForCausalLM.from_pretrained(order["model"], dtype="auto")
    tokens = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
    oneshot(
        model=model,
        dataset=Dataset.from_dict(tokens),
        recipe=recipe(order),
        max_seq_length=max(map(len, rows)),
        num_calibration_samples=len(rows),
    )
    model.save_pretrained(order["out"], save_compressed=True)
    AutoTokenizer.from_pretrained(order["model"]).save_pretrained(order["out"])


def recipe(order: dict[str, Any]) -> list[Any]:
    if order["scheme"] == "w8a8":
        solver = GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])
        return [SmoothQuantModifier(smoothing_strength=0.8), solver]
    scheme = preset_name_to_scheme("W4A16", ["Linear"])
    scheme.weights.group_size = order["group_size"]
    if order["group_size"] == -1:
        scheme.weights.strategy, scheme.weights.group_size = "channel", None
    return [GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"], **order["options"])]


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_bytes()))
