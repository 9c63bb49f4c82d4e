"""The parent as transformers itself opens it: its own names, ties, fused tensors and dtypes.

None of our readers has a part in the weights, so that what one of them gets wrong shows where this
model stands beside it. Ours is what was made of other files first (GGUF, a trainer's checkpoint, a
base with room for an adapter), and what adapters and training's rounding change. Refuses folders
that leave a parameter without a value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as chatter

from quant import artifact, paths
from quant.errors import SourceError
from quant.intake import architecture, attention, spelling
from quant.intake.source import Source
from quant.intake.spelling import Part

_UNREADABLE = (OSError, ValueError, RuntimeError, AttributeError, LookupError, TypeError)


def parent(source: Source, device: torch.device) -> PreTrainedModel:
    """The whole parent in float32 on `device`, adapters merged, evaluating.

    Out of the user's own folder wherever transformers can open it; what we made of that comes after
    it. SourceError.
    """
    given = paths.full(source.spec)
    plain = any((given / name).is_file() for name in (artifact.SINGLE, artifact.INDEX))
    if plain and not source.adapters and given.resolve() != source.folder.resolve():
        with suppress(SourceError):
            return model(replace(source, folder=given), torch.float32, device)
    return model(source, torch.float32, device)


def model(source: Source, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The whole parent in `dtype` on `device`, adapters merged, evaluating.

    SourceError where transformers cannot open it, or finds no value for a parameter.
    """
    opener: Any = architecture.builder(source.config)
    try:
        with _quiet():
            found, told = opener.from_pretrained(
                source.folder,
                config=architecture.config(source.folder),
                dtype=dtype,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are named below
            )
    except _UNREADABLE as fault:
        reason = " ".join(str(fault).split())[:300]
        raise SourceError(f"{source.folder} cannot be loaded: {reason}") from fault
    _check(source, told)
    attention.settle(found)
    _merge(found, source)
    whole: PreTrainedModel = found.to(device).eval()
    architecture.interruptible(whole)
    return whole


@contextmanager
def _quiet() -> Iterator[None]:
    """What transformers would print about a folder is said in one line, if it matters."""
    bars, level = chatter.is_progress_bar_enabled(), chatter.get_verbosity()
    chatter.disable_progress_bar()
    chatter.set_verbosity_error()
    try:
        yield
    finally:
        chatter.set_verbosity(level)
        if bars:
            chatter.enable_progress_bar()


def _check(source: Source, told: dict[str, Any]) -> None:
    for name, has, needs in sorted(told["mismatched_keys"]):
        raise SourceError(f"{source.folder}: {name} is {list(has)}, config.json says {list(needs)}")
    if missing := sorted(told["missing_keys"]):
        raise SourceError(
            f"{source.folder} lacks {missing[0]}, which {source.architecture} needs to run"
        )


def _merge(model: PreTrainedModel, source: Source) -> None:
    """What adapters change, into the loaded model; an expert's layer is rows of a fused tensor."""
    fused = spelling.expert_parts(model)
    for name, own in spelling.own_names(model, source.tensors.names()).items():
        if source.tensors.is_changed(name):
            part = fused.get(name, Part(own, 0, source.tensors.shape(name)))
            rows = model.get_parameter(part.of).data.view(-1, part.shape[-1])
            its = rows[part.first : part.first + math.prod(part.shape[:-1])].view(part.shape)
            its.copy_(source.tensors.changed(name, its))
