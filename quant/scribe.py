"""The model writes its own calibration text from our prompts.

What a chat model says to a chat prompt is closer to what it will be asked to compute than any
corpus we could ship. Rows decode together, one token a step. A row's prompt tokens are fed to it
in the same steps in which other rows sample, and a row whose answer ends begins the next prompt,
so there is no padding, no prefill and no finished row that idles.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from quant import interrupt, tokens
from quant.errors import CalibrationError, TemplateRefusal
from quant.intake import loaded
from quant.intake.source import Source
from quant.lora import starts
from quant.recipe import Recipe
from quant.solver import devices

PROMPTS = Path(__file__).with_name("prompts.jsonl")
_TOP_K, _TEMPERATURE = 40, 0.8
# More rows at once cost memory for keys and values and no longer gain speed.
_ROWS_AT_ONCE = 128
_FLOAT32_LIMIT = 4 << 30  # bytes of parent up to which a CPU decodes in float32: it is faster
# Files beside weights and tokenizer that decide the text: rotary base, scales, end tokens.
_DECIDING = ("config.json", "generation_config.json")
_METHOD = 2  # raised when the same inputs would give other text

Say = Callable[[str], None]


def rows(source: Source, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, say: Say) -> Tensor:
    """[samples, length] int64, every token real; from the cache where the same was written.

    The key is all that decides the text: parent, adapters, seed, sizes, prompts and versions.
    CalibrationError where the tokenizer is another model's, or its template refuses a question.
    """
    kept = kept_in(source, recipe)
    if kept.is_file():
        try:
            return load_file(kept)["input_ids"]
        except (SafetensorError, KeyError):
            say(f"{kept} is damaged; writing it again")
    generator = torch.Generator().manual_seed(recipe.seed)
    prompts = _prompts(tokenizer, generator)
    tokens.check_vocabulary(
        itertools.chain.from_iterable(prompts), source.config.get_text_config().vocab_size
    )
    say(f"the model writes {recipe.samples} x {recipe.length} tokens of calibration text")
    device = devices.first(recipe.device)
    model = loaded.model(source, loaded_as(source, device), device)
    turns = itertools.cycle(prompts)
    parts = [
        _write(model, turns, (count, recipe.length), generator, say)
        for count in _portions(recipe.samples)
    ]
    ids = torch.cat(parts)
    try:
        _keep(kept, ids)
    except OSError as fault:  # minutes of work: a cache is no reason to lose them
        say(f"{kept.parent} cannot be written ({fault.strerror}); the text is not kept")
    return ids


def kept_in(source: Source, recipe: Recipe) -> Path:
    """The file that holds these rows once they are written."""
    return source.cache / "calibration" / f"{_key(source, recipe)}.safetensors"


def loaded_as(source: Source, device: torch.device) -> torch.dtype:
    """The dtype of the model while it writes."""
    small = source.bytes <= _FLOAT32_LIMIT
    return torch.float32 if device.type == "cpu" and small else source.dtype


def _key(source: Source, recipe: Recipe) -> str:
    facts = [
        _METHOD,
        source.fingerprint.model_dump(),
        source.training.base,
        [(adapter.digest, starts.identity(adapter)) for adapter in source.adapters],
        [recipe.samples, recipe.length, recipe.seed, recipe.device],
        [
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
            for path in (PROMPTS, *(source.folder / name for name in _DECIDING))
        ],
        [torch.__version__, transformers.__version__],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def questions(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Our prompts as token ids, each up to where its answer begins. TemplateRefusal."""
    texts = [json.loads(line)["text"] for line in PROMPTS.read_text("utf-8").splitlines()]
    turns = ([{"role": "user", "content": text}] for text in texts)
    return [tokens.of_chat(turn, tokenizer, asks=True) for turn in turns]


def _prompts(tokenizer: PreTrainedTokenizerBase, generator: torch.Generator) -> list[list[int]]:
    """Our prompts in a seeded order."""
    try:
        asked = questions(tokenizer)
        order = torch.randperm(len(asked), generator=generator).tolist()
        prompts = [asked[place] for place in order]
    except TemplateRefusal as fault:
        raise CalibrationError(
            f"the chat template refuses a user's question ({fault}), so the model cannot write its"
            " own calibration text; give a calibration file"
        ) from fault
    if not all(prompts):
        raise CalibrationError(
            "the chat template writes nothing for a user's question, so the model cannot write its"
            " own calibration text; give a calibration file"
        )
    return prompts


def _portions(samples: int) -> list[int]:
    """Nearly equal parts of at most _ROWS_AT_ONCE."""
    parts = -(-samples // _ROWS_AT_ONCE)
    return [samples // parts + (place < samples % parts) for place in range(parts)]


@torch.inference_mode()
def _write(
    model: PreTrainedModel,
    prompts: Iterator[list[int]],
    shape: tuple[int, int],
    generator: torch.Generator,
    say: Say,
) -> Tensor:
    count, length = shape
    ends = _ends(model)
    due = [deque(next(prompts)) for _ in range(count)]
    ids = torch.empty(shape, dtype=torch.int64)
    ids[:, 0] = torch.tensor([queue.popleft() for queue in due])
    cache = DynamicCache(config=model.config)
    for place in range(1, length):
        interrupt.check()
        step: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        logits = model(input_ids=ids[:, place - 1 : place].to(model.device), **step).logits
        sampled = _sample(logits[:, -1].float().cpu(), generator)
        for row, token in enumerate(sampled.tolist()):
            if due[row]:
                ids[row, place] = due[row].popleft()
                continue
            ids[row, place] = token
            if token in ends:
                due[row].extend(next(prompts))
        if place % 64 == 0:
            say(f"calibration text: {place * 100 // length}% of {count} x {length} tokens")
    return ids


def _ends(model: PreTrainedModel) -> set[int]:
    end = model.generation_config.eos_token_id
    if end is None:
        return set()
    return set(end) if isinstance(end, list) else {end}


def _sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token of each row's _TOP_K likeliest, [rows]."""
    values, choices = logits.topk(min(_TOP_K, logits.shape[-1]))
    chances = torch.softmax(values / _TEMPERATURE, dim=-1)
    picked = torch.multinomial(chances, 1, generator=generator)
    return choices.gather(1, picked)[:, 0]


def _keep(path: Path, ids: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({"input_ids": ids}, staged)
    staged.replace(path)
