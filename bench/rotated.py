"""A copy of a Llama-shaped model whose residual stream is turned by a random rotation.

The same function, other weights: what a 4-bit file left on a grid no longer lies on one. Each
norm's weights go into the linear layers that read it, then the embedding and whatever writes into
the residual stream are turned one way and whatever reads it the other. The last norm's weights go
into the output head, which is stored untied: one matrix cannot be both. Refuses other
architectures.

    python -m bench.rotated demo --out rotated
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from quant import checkpoint
from quant.intake import source
from quant.intake.source import Source

SUPPORTED = ("LlamaForCausalLM", "MistralForCausalLM")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# The layers that read each norm of a block.
READERS: Mapping[str, tuple[str, ...]] = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", metavar="SOURCE", help="what `quantserve quantize` takes")
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    parser.add_argument("--seed", type=int, default=0, help="of the rotation")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="to store it in")
    asked = parser.parse_args()
    write(source.open(asked.source), asked.out, seed=asked.seed, dtype=DTYPES[asked.dtype])
    print(f"{asked.out}: {asked.source} turned by rotation {asked.seed}, in {asked.dtype}")


def write(parent: Source, folder: Path, *, seed: int, dtype: torch.dtype) -> None:
    """Writes the rotated model as a plain folder, its tokenizer beside it."""
    if parent.architecture not in SUPPORTED:
        sys.exit(f"{parent.architecture}: the rotation is written for {', '.join(SUPPORTED)}")
    folder.mkdir(parents=True)
    stored = {name: tensor.to(dtype).contiguous() for name, tensor in turned(parent, seed).items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((parent.folder / "config.json").read_bytes())
    config.pop("torch_dtype", None)
    config |= {"dtype": str(dtype).removeprefix("torch."), "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    checkpoint.copy_companions(parent.folder, folder)


def turned(parent: Source, seed: int) -> dict[str, Tensor]:
    """Every tensor of the rotated model in float32; biases and what has no part in it as it was."""
    rotation = _rotation(parent.config.get_text_config().hidden_size, seed)
    tensors = {name: parent.tensors.get(name).double() for name in parent.tensors.names()}
    embedding = tensors["model.embed_tokens.weight"]
    head = tensors.get("lm_head.weight", embedding) * tensors["model.norm.weight"]
    tensors["lm_head.weight"] = head @ rotation
    tensors["model.embed_tokens.weight"] = embedding @ rotation
    tensors["model.norm.weight"] = torch.ones_like(tensors["model.norm.weight"])
    for place in range(parent.config.get_text_config().num_hidden_layers):
        _turn_block(tensors, f"model.layers.{place}.", rotation)
    return {name: tensor.float() for name, tensor in tensors.items()}


def _turn_block(tensors: dict[str, Tensor], prefix: str, rotation: Tensor) -> None:
    for norm, readers in READERS.items():
        scale = tensors[f"{prefix}{norm}.weight"]
        for reader in readers:
            name = f"{prefix}{reader}.weight"
            tensors[name] = (tensors[name] * scale) @ rotation
        tensors[f"{prefix}{norm}.weight"] = torch.ones_like(scale)
    for writer in WRITERS:
        for leaf in ("weight", "bias"):
            name = f"{prefix}{writer}.{leaf}"
            if name in tensors:
                tensors[name] = rotation.T @ tensors[name]


def _rotation(width: int, seed: int) -> Tensor:
    """A random orthogonal matrix [width, width], uniform over all of them, float64."""
    normal = torch.randn(
        width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    q, r = torch.linalg.qr(normal)
    uniform: Tensor = q * r.diagonal().sign()
    return uniform


if __name__ == "__main__":
    main()
