"""Prompt-tuned folders as PEFT leaves them, and PEFT's own answers for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

KINDS: dict[str, Any] = {"PROMPT_TUNING": PromptTuningConfig, "P_TUNING": PromptEncoderConfig}
_MORE = {**KINDS, "PREFIX_TUNING": PrefixTuningConfig}


def write_soft(folder: Path, rows: torch.Tensor, **config: Any) -> Path:
    """By hand: `rows` [virtual tokens, width]."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"prompt_embeddings": rows}, folder / "adapter_model.safetensors")
    told = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": len(rows), **config}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return folder


def trained_soft(folder: Path, base: Path, kind: str, *, tokens: int, seed: int = 0) -> Path:
    """By PEFT: a random soft prompt or prompt encoder on the model in `base`."""
    parent = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    encoder = {"encoder_hidden_size": 32} if kind == "P_TUNING" else {}
    config = _MORE[kind](task_type="CAUSAL_LM", num_virtual_tokens=tokens, **encoder)
    get_peft_model(parent, config).save_pretrained(folder)
    return folder


WAVERS = 0.001  # nats: a hundred times what sums in another order move in float32


class Reference:
    """Greedy answers of transformers, and of PEFT over it."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._tokenizer = AutoTokenizer.from_pretrained(base)

    def tokens(self, adapter: Path | None, prompt: str, count: int, **how: Any) -> list[int]:
        """The ids after `prompt`, never stopping early; `how` as transformers' generate."""
        model: Any = AutoModelForCausalLM.from_pretrained(self._base, dtype=torch.float32).eval()
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter).eval()
        ids = self._tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count,
            min_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=1,
            return_dict_in_generate=True, output_scores=True, **how,
        )  # fmt: skip
        best = torch.cat(out.scores).topk(2).values
        lead = float((best[:, 0] - best[:, 1]).min())
        assert lead > WAVERS, f"the reference wavers at {prompt!r}, by {lead}: take another prompt"
        told: list[int] = out.sequences[0, ids.shape[1] :].tolist()
        return told
