"""A copy of a Llama-shaped model whose residual stream is turned by a random rotation.

The same function, other weights: what a 4-bit file left on a grid no longer lies on one. Each
norm's weights go into the linear layers that read it, then the embedding and whatever writes into
the residual stream are turned one way and whatever reads it the other. The last norm's weights go
into the output head, which is stored untied: one matrix cannot be both. The stream can be turned
into a wider one, of which it fills a part, and the last heads be doubled, each to put out half: so
that widths become multiples of a group size. Refuses other architectures.

    python -m bench.rotated demo --out rotated
    python -m bench.rotated demo --out wider --width 768 --kv-heads 4    # for groups of 128
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

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
    parser.add_argument("--width", type=int, help="of the stream [its own]")
    parser.add_argument("--kv-heads", type=int, help="heads of keys and values [its own]")
    asked = parser.parse_args()
    opened = source.open(asked.source)
    turn = Turn.of(opened.config.get_text_config(), asked.seed, asked.width, asked.kv_heads)
    write(opened, asked.out, turn=turn, dtype=DTYPES[asked.dtype])
    print(f"{asked.out}: {asked.source} turned by rotation {asked.seed}, in {asked.dtype}")


@dataclass(frozen=True, slots=True)
class Turn:
    """`rotation` [width, new width] has orthonormal rows; `heads` of queries for each of keys and
    values, `size` each, the last of which is there `copies` times."""

    rotation: Tensor
    heads: int
    size: int
    copies: int

    @classmethod
    def of(
        cls, config: PretrainedConfig, seed: int, width: int | None = None, kv: int | None = None
    ) -> Turn:
        """The turn of a model into so wide a stream and so many heads of keys and values."""
        own, its = config.hidden_size, config.num_key_value_heads
        if (width or own) < own or (kv or its) < its:
            sys.exit(f"the model is {own} wide with {its} heads of keys and values: none can go")
        return cls(
            _rotation(width or own, seed)[:own],
            config.num_attention_heads // its,
            getattr(config, "head_dim", None) or own // config.num_attention_heads,
            1 + (kv or its) - its,
        )

    @property
    def shrunk(self) -> float:
        """What a norm over the new width multiplies by to be the one over the old."""
        own, new = self.rotation.shape
        return math.sqrt(own / new)


def write(parent: Source, folder: Path, *, turn: Turn, dtype: torch.dtype) -> None:
    """Writes the rotated model as a plain folder, its tokenizer beside it."""
    if parent.architecture not in SUPPORTED:
        sys.exit(f"{parent.architecture}: the rotation is written for {', '.join(SUPPORTED)}")
    folder.mkdir(parents=True)
    stored = {name: tensor.to(dtype).contiguous() for name, tensor in turned(parent, turn).items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((parent.folder / "config.json").read_bytes())
    config.pop("torch_dtype", None)
    text = parent.config.get_text_config()
    kv = text.num_key_value_heads + turn.copies - 1
    config |= {
        "dtype": str(dtype).removeprefix("torch."), "tie_word_embeddings": False,
        "hidden_size": turn.rotation.shape[1], "head_dim": turn.size, "num_key_value_heads": kv,
        "num_attention_heads": kv * turn.heads, "rms_norm_eps": text.rms_norm_eps * turn.shrunk**2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    checkpoint.copy_companions(parent.folder, folder)


def turned(parent: Source, turn: Turn) -> dict[str, Tensor]:
    """Every tensor of the rotated model in float32; biases and what has no part in it as it was."""
    tensors = {name: parent.tensors.get(name).double() for name in parent.tensors.names()}
    embedding = tensors["model.embed_tokens.weight"]
    head = tensors.get("lm_head.weight", embedding) * tensors["model.norm.weight"]
    tensors["lm_head.weight"] = head @ turn.rotation
    tensors["model.embed_tokens.weight"] = embedding @ turn.rotation
    tensors["model.norm.weight"] = _norm(turn)
    for place in range(parent.config.get_text_config().num_hidden_layers):
        _double_heads(tensors, f"model.layers.{place}.self_attn.", turn)
        _turn_block(tensors, f"model.layers.{place}.", turn)
    return {name: tensor.float() for name, tensor in tensors.items()}


def _norm(turn: Turn) -> Tensor:
    return torch.full((turn.rotation.shape[1],), turn.shrunk, dtype=torch.float64)


def _double_heads(tensors: dict[str, Tensor], prefix: str, turn: Turn) -> None:
    """The last head of keys and values, with its queries, `copies` times; of each a share."""
    for name, heads in (("q_proj", turn.heads), ("k_proj", 1), ("v_proj", 1)):
        for leaf in ("weight", "bias"):
            rows = tensors.get(f"{prefix}{name}.{leaf}")
            if rows is not None:
                more = [rows[-heads * turn.size :]] * (turn.copies - 1)
                tensors[f"{prefix}{name}.{leaf}"] = torch.cat([rows, *more])
    out = tensors[f"{prefix}o_proj.weight"]
    last = out[:, -turn.heads * turn.size :] / turn.copies
    first = out[:, : -turn.heads * turn.size]
    tensors[f"{prefix}o_proj.weight"] = torch.cat([first, *[last] * turn.copies], dim=1)


def _turn_block(tensors: dict[str, Tensor], prefix: str, turn: Turn) -> None:
    for norm, readers in READERS.items():
        scale = tensors[f"{prefix}{norm}.weight"]
        for reader in readers:
            name = f"{prefix}{reader}.weight"
            tensors[name] = (tensors[name] * scale) @ turn.rotation
        tensors[f"{prefix}{norm}.weight"] = _norm(turn)
    for writer in WRITERS:
        for leaf in ("weight", "bias"):
            name = f"{prefix}{writer}.{leaf}"
            if name in tensors:
                tensors[name] = turn.rotation.T @ tensors[name]


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
