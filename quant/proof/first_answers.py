"""Whether an artifact begins its answers as its parent does: a look that every run takes.

Asks both models our own questions and compares what they would say first. Streams: a block of one
model is held at a time. Measures little and quickly; `compare` measures well.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from quant import checkpoint, interrupt, scribe, tokens
from quant.artifact import Manifest
from quant.errors import TemplateRefusal
from quant.formats import FULL
from quant.intake import architecture
from quant.intake.source import Source
from quant.proof.evidence import FirstAnswers
from quant.recipe import GROUP_SIZES
from quant.solver import blocks, head, int8
from quant.solver.blocks import Decoder, Stream

_TOGETHER = 16  # questions
_MOST_DIFFER, _MOST_KL = 0.05, 0.05  # of the questions; nats


@dataclass(frozen=True, slots=True)
class _Written:
    """The staged artifact as blocks are filled from it."""

    tensors: checkpoint.Dequantized


@torch.inference_mode()
def compared(
    decoder: Decoder, source: Source, folder: Path, manifest: Manifest
) -> FirstAnswers | None:
    """Of the artifact in `folder` and the `source` it was made of, in float32.

    None for a model that cannot be asked: its chat template takes no question, it reads too few
    tokens, or its tokenizer is another model's.
    """
    rows = _rows(source)
    if rows is None:
        return None
    alone = replace(decoder, others=(), dtype=torch.float32)
    streams, _ = blocks.embed(alone, source, rows)
    written = _Written(checkpoint.Dequantized(folder))
    coded = {layer.name for layer in manifest.layers if layer.bits != FULL.bits}
    rounded = coded if manifest.scheme == "w8a8" else set()
    where = alone.device, alone.dtype
    for place, block in enumerate(alone.blocks):
        interrupt.check()
        names = alone.names(place)
        with blocks.filled(block, names, source, *where):
            for stream in streams:
                stream.parent = _behind(block, stream.parent, stream.calls[place])
        with blocks.filled(block, names, written, *where), _rounding(alone, place, rounded):
            for stream in streams:
                stream.hidden = _behind(block, stream.hidden, stream.calls[place])
    with head.filled(alone, source):
        found = [_judged(alone, stream) for stream in streams]
    kl, differ = (torch.cat(column) for column in zip(*found, strict=True))
    return FirstAnswers(questions=len(kl), differ=int(differ.sum()), mean_kl=float(kl.mean()))


def told(found: FirstAnswers, manifest: Manifest, widths: Collection[int]) -> str:
    """A line for people; with what would be closer, where the artifact is far from its parent.

    `widths` are in_features of the layers.
    """
    if found.differ <= _MOST_DIFFER * found.questions and found.mean_kl <= _MOST_KL:
        return str(found)
    ways = ", ".join(_closer(manifest, widths))
    return f"warning: {found}: that is far; closer: {ways}"


def _closer(manifest: Manifest, widths: Collection[int]) -> list[str]:
    """Options of `quantize` that lose less, the smallest artifact first."""
    scheme, mixed = manifest.scheme, manifest.recipe.get("bits_per_weight") is not None
    finest = min(size for size in GROUP_SIZES if size > 0)
    divides = manifest.group_size != finest and not any(width % finest for width in widths)
    more = int(manifest.bits_per_weight or manifest.bits) + 1
    found = []
    if divides and not mixed and scheme != "w8a8":
        found.append(f"--group-size {finest}")
    if scheme != "w8a16":
        found += [f"--bits-per-weight {more}"] if more < FULL.bits else []
        found.append("--scheme w8a16")
    return found or ["--refine 8"]


def _rows(source: Source) -> list[tuple[Tensor, Tensor]] | None:
    """Token ids [rows, length] and a mask of what is real, several questions at a time, those of
    like lengths together."""
    try:
        asked = scribe.questions(tokens.load_tokenizer(source.folder))
    except TemplateRefusal:
        return None
    longest, most = (
        architecture.positions(source.config),
        source.config.get_text_config().vocab_size,
    )
    asked = sorted((ids for ids in asked if 0 < len(ids) <= longest), key=len)
    if not asked or max(map(max, asked)) >= most:
        return None
    found = []
    for first in range(0, len(asked), _TOGETHER):
        rows = [torch.tensor(ids) for ids in asked[first : first + _TOGETHER]]
        ids = pad_sequence(rows, batch_first=True)
        length = torch.tensor([len(row) for row in rows])
        found.append((ids, torch.arange(ids.shape[1]) < length[:, None]))
    return found


def _behind(block: nn.Module, states: Tensor, call: blocks.Call) -> Tensor:
    args, kwargs = call
    out: Any = block(states, *args, **kwargs)
    made: Tensor = out[0] if isinstance(out, tuple) else out
    return made


@contextmanager
def _rounding(decoder: Decoder, place: int, layers: set[str]) -> Iterator[None]:
    """Lets those of a block's linear layers whose names are in `layers` read int8 inputs."""
    with ExitStack() as undo:
        for name, linear in blocks.linears(decoder.blocks[place]).items():
            if decoder.home(place) + decoder.module(place, name) in layers:
                undo.callback(linear.register_forward_pre_hook(_rounded).remove)
        yield


def _rounded(_linear: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (int8.as_served(inputs[0]),)


def _judged(decoder: Decoder, stream: Stream) -> tuple[Tensor, Tensor]:
    """KL(parent || artifact) in nats and whether another token is likeliest, [rows] each."""
    last = stream.mask.sum(dim=1) - 1
    rows = torch.arange(len(last), device=last.device)

    def predicted(states: Tensor) -> Tensor:
        logits = head.logits(decoder, states[rows, last][:, None])
        return logits[:, 0].double().log_softmax(-1)

    before, after = predicted(stream.parent), predicted(stream.hidden)
    kl = (before.exp() * (before - after)).sum(-1).clamp_min(0)
    return kl.cpu(), (before.argmax(-1) != after.argmax(-1)).cpu()
