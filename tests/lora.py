"""PEFT LoRA folders written by hand: the bytes a trainer leaves, without a trainer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file


def held(folder: Path) -> dict[str, bytes]:
    """What a folder holds, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_lora(
    folder: Path,
    shapes: Mapping[str, tuple[int, int]],
    *,
    rank: int = 4,
    seed: int = 0,
    strength: float = 0.05,
) -> Path:
    """An adapter on the modules in `shapes` (name -> (out, in)), strong enough to be seen."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (out_features, in_features) in shapes.items():
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, in_features, generator=generator)
        tensors[f"{prefix}.lora_B.weight"] = strength * torch.randn(
            out_features, rank, generator=generator
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({module.rpartition(".")[2] for module in shapes}),
        "bias": "none",
        "base_model_name_or_path": "tests",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
