"""A base made over for an adapter that changes its kind: a head of its own, or more rows.

What `quantize` reads then is a copy in the cache; numbers are still merged as tensors are read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from quant import artifact, checkpoint, companions, foreign_json
from quant.headers import TensorHeader
from quant.intake import cached
from quant.lora import anatomy, voice
from quant.lora.adapter import Adapter
from quant.lora.anatomy import Anatomy, Plan
from quant.lora.merge import whole
from quant.shards import Writer


def fitted(
    folder: Path,
    parts: Anatomy,
    headers: Mapping[str, TensorHeader],
    adapters: Sequence[Adapter],
    cache: Path,
) -> Path:
    """`folder` itself where the adapters, placed on it, fit it as it is, else a copy that they fit.

    AdapterError where they fit neither.
    """
    plan = anatomy.plan(parts, {name: header.shape for name, header in headers.items()}, adapters)
    if not plan.untie and plan.vocabulary is None:
        return folder
    text = [str(folder.resolve()), str(plan), *(adapter.digest for adapter in adapters)]
    identity = hashlib.sha256("\n".join(text).encode()).hexdigest()[:12]
    made = partial(_make, folder, parts, plan, adapters)
    return cached.folder(cache / "adapted" / f"{folder.name}-{identity}", made)


def names(parts: Anatomy, plan: Plan, stored: Sequence[str]) -> list[str]:
    """Tensors of the result: a tied copy of the head is left out, a parted head is not."""
    kept = set(stored) - ({parts.head} if parts.tied else set())
    return sorted(kept | ({parts.head} if plan.untie else set()))


def write_config(folder: Path, target: Path, plan: Plan, dtype: torch.dtype | None) -> None:
    """The base's config.json with what the plan changes, and `dtype` where one is asked for."""
    config: dict[str, Any] = foreign_json.read(folder / "config.json")
    changes: dict[str, Any] = {}
    if plan.untie:
        changes["tie_word_embeddings"] = False
    if plan.vocabulary is not None:
        changes["vocab_size"] = plan.vocabulary
    inner = config.get("text_config")
    if isinstance(inner, dict):
        inner |= changes
    config |= changes
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(plan: Plan, adapters: Sequence[Adapter], target: Path) -> int:
    """How many files: a grown vocabulary's tokenizer lies with the adapter, if anywhere."""
    if plan.vocabulary is None:
        return 0
    return sum(len(companions.copy(a.folder, target, companions.TOKENIZER)) for a in adapters)


def copy_voice(adapters: Sequence[Adapter], rows: int, target: Path) -> None:
    """One adapter's own chat template, generation defaults and tokens become the model's.

    Several that differ would contradict each other: the base keeps its own. So does its tokenizer
    where an adapter's has tokens beyond the `rows` of the embedding, which nothing trained.
    """
    voices = {adapter.voice.identity() for adapter in adapters}
    if len(voices) > 1 or b"" in voices:
        return
    spoken, lies = adapters[0].voice, adapters[0].folder
    if spoken.templates:  # one of the base's that stays would answer in an adapter's stead
        shutil.rmtree(target / companions.TEMPLATES, ignore_errors=True)
    if (lies / voice.TOKENIZER).is_file() and max(spoken.added.values(), default=0) < rows:
        companions.copy(lies, target, companions.TOKENIZER)
    companions.copy(lies, target, (companions.GENERATION,))
    for name, template in spoken.templates.items():
        file = target / voice.TEMPLATE_FILES[name]
        file.parent.mkdir(exist_ok=True)
        file.write_text(template, encoding="utf-8")


def _make(
    folder: Path,
    parts: Anatomy,
    plan: Plan,
    adapters: Sequence[Adapter],
    target: Path,
) -> None:
    headers, writer = artifact.headers(folder), Writer(target)
    for name in names(parts, plan, list(headers)):
        kept = parts.embedding if parts.tied and name == parts.head else name
        with safe_open(folder / headers[kept].file, framework="pt") as file:
            stored: Tensor = file.get_tensor(kept)
        grown = plan.vocabulary is not None and name in (parts.embedding, parts.head)
        found = [w for a in adapters if grown and (w := whole(a, name)) is not None]
        writer.add(name, found[0].to(stored.dtype) if found else stored)
    writer.close()
    checkpoint.copy_companions(folder, target)
    copy_tokenizer(plan, adapters, target)
    write_config(folder, target, plan, None)
