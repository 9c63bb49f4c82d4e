"""Every LoRA variant that PEFT trains, made on tiny models, and PEFT's own answers for them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from tests import tiny

PROMPT = torch.arange(4, 36).reshape(2, 16)

# Name -> settings of peft.LoraConfig beside rank and alpha.
PLAIN: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 9},
    "ranks": {"rank_pattern": {"down_proj": 2, "layers.0.self_attn.q_proj": 7}},
    "alphas": {"alpha_pattern": {"v_proj": 1, r"layers\.1\.mlp.*": 20}},
    "patterns": {
        "use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 32},
    },
    "all-linear": {"targets": "all-linear"},
    "attention": {"targets": ("q_proj", "k_proj", "v_proj", "o_proj")},
    "regex": {"targets": r".*layers\.1\..*\.(up|down)_proj"},
    "one-layer": {"layers_to_transform": [1]},
    "head": {"targets": ("lm_head", "q_proj")},
}  # fmt: skip
BEYOND: Mapping[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "dora-rslora": {"use_dora": True, "use_rslora": True, "targets": "all-linear"},
    "dora-embedding": {"use_dora": True, "targets": ("embed_tokens", "q_proj")},
    "embedding": {"targets": ("embed_tokens", "q_proj")},
    "saved-head": {"modules_to_save": ["lm_head"]},
    "saved-all": {"modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    "tokens": {"trainable_token_indices": [5, 6, 300]},
}
BIASED: Mapping[str, dict[str, Any]] = {
    "bias-all": {"bias": "all"},
    "bias-lora": {"bias": "lora_only"},
    "lora-bias": {"lora_bias": True, "targets": ("q_proj", "k_proj", "v_proj")},
}
STARTS: Mapping[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "pissa-dora": {"init_lora_weights": "pissa", "use_dora": True},
}


@contextmanager
def one_thread() -> Iterator[None]:
    """Tiny models spend their time waking threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def trained(
    folder: Path, base: Path, *, vocabulary: int | None = None, seed: int = 0, **settings: Any
) -> tuple[Path, Tensor]:
    """An adapter whose every trained tensor was moved, as PEFT saves it, and its logits.

    The logits [2, 16, vocab] are those of the model that was trained: base and adapter, unmerged.
    With a start that PEFT can convert, the initial adapter lies beside, in START_init.
    """
    model = parent(base)
    if vocabulary is not None:
        torch.manual_seed(7)
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    torch.manual_seed(seed)
    targets = settings.pop("targets", ("q_proj", "v_proj", "down_proj"))
    rest = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **settings}
    made = get_peft_model(
        model,
        LoraConfig(target_modules=targets if isinstance(targets, str) else list(targets), **rest),
    )
    start = rest.get("init_lora_weights")
    if isinstance(start, str):
        made.save_pretrained(folder.parent / f"{start.partition('_niter')[0]}_init")
    move(made)
    made.save_pretrained(folder)
    return folder, logits(made)


def move(model: torch.nn.Module) -> None:
    """What training does: every trainable number changes a little."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)


def parent(folder: Path) -> PreTrainedModel:
    """The model in a folder in float32, by the class that its config.json names."""
    named = json.loads((folder / "config.json").read_text())["architectures"][0]
    model: PreTrainedModel = getattr(transformers, named).from_pretrained(
        folder, dtype=torch.float32
    )
    return model


def logits(model: Any) -> Tensor:
    """Of PROMPT; behind an image where there is a tower for which a test has one."""
    model.eval()
    ids, seen = PROMPT, {}
    if model.config.model_type == "llava":
        image = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        ids = torch.cat([torch.full((1, 16), 5), PROMPT[1:]], dim=1)
        seen = {"pixel_values": image}
    with torch.inference_mode():
        found: Tensor = model(ids, **seen).logits
    return found


def loaded(folder: Path) -> Tensor:
    """Logits of the plain model in a folder, run in float32."""
    return logits(parent(folder))


def with_adapter(base: Path, folder: Path) -> Tensor:
    """Logits that PEFT gives for the adapter in a folder, unmerged, on the model in another."""
    return logits(PeftModel.from_pretrained(parent(base), folder))


def base_folder(folder: Path, family: str = "llama", **shape: Any) -> Path:
    """A tiny base in float32, so that nothing but the merge can round."""
    return tiny.model_folder(folder, family, dtype=torch.float32, **shape)
