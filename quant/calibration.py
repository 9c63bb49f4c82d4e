"""Calibration tokens: from a JSONL file, or written by the model itself when there is none.

Owns the file's format, the chat template and BOS, and the packing into rows. A malformed line
is refused with its number; a set that comes out shorter than asked is reported and used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
import torch
from pydantic import BaseModel, Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quant import jsonl, scribe, tokens
from quant.artifact import CalibrationReport
from quant.errors import CalibrationError, RecipeError
from quant.intake.source import Source
from quant.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Batches:
    """Token rows, and which of their tokens count.

    Real tokens are a prefix of each row, so causal attention needs no further mask.
    """

    input_ids: Tensor  # [samples, length] int64
    mask: Tensor  # [samples, length] bool, true where a token is real
    report: CalibrationReport


# The whole file, or its last tenth, or what comes before that.
Part = Literal["whole", "held-out", "calibrating"]


class Record(BaseModel):
    """One line: a text, or a chat. Keys beyond the two are the file owner's business."""

    text: str | None = None
    messages: list[dict[str, Any]] | None = Field(default=None, min_length=1)


def prepare(
    source: Source,
    recipe: Recipe,
    file: Path | None,
    say: Callable[[str], None],
    part: Part = "whole",
) -> Batches:
    """At most `recipe.samples` rows of `recipe.length` tokens, the same for the same seed.

    CalibrationError names the line that is malformed, or says that none is usable. Without a
    file the model writes the rows (cached in the source's cache folder). `part` is of the file.
    """
    check_length(source, recipe.length)
    tokenizer = tokens.load_tokenizer(source.folder)
    if file is None:
        ids = scribe.rows(source, tokenizer, recipe, say)
        batches = _batches(list(ids.tolist()), recipe.length, "self-generated")
    else:
        usable = _part(file, part)
        rows = _from_file(file, usable, tokenizer, recipe)
        batches = _batches(rows, recipe.length, "file")
    vocabulary = source.config.get_text_config().vocab_size
    tokens.check_vocabulary([int(batches.input_ids.max())], vocabulary)
    if batches.report.samples < recipe.samples:
        what = "held-out text" if part == "held-out" else "calibration"
        say(
            f"{what} has {batches.report.samples} rows of {recipe.length} tokens,"
            f" fewer than the {recipe.samples} asked for"
        )
    return batches


def check_length(source: Source, length: int) -> None:
    """RecipeError for sequences that are longer than the model can read."""
    positions = source.config.get_text_config().max_position_embeddings
    if length > positions:
        raise RecipeError(f"length {length} exceeds the model's {positions} positions")


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What starts every sequence: one token, or none."""
    # A tokenizer that also ends documents leaves [BOS, EOS] of an empty one.
    empty = tokens.of_text("", tokenizer)
    return empty[:1] if empty[:1] == [tokenizer.bos_token_id] else []


def pack(
    streams: Iterator[list[int]], length: int, samples: int, bos: list[int]
) -> list[list[int]]:
    """Documents one after the other, cut into rows of `length`; the last row may be shorter.

    A row that starts inside a document gets `bos` before it, as every served sequence does.
    """
    rows: list[list[int]] = []
    row: list[int] = []
    for stream in streams:
        rest = stream
        while rest:
            room = length - len(row)
            row, rest = row + rest[:room], rest[room:]
            if len(row) == length:
                rows.append(row)
                row = list(bos) if rest else []
            if len(rows) == samples:
                return rows
    return [*rows, row] if row else rows


def _part(file: Path, part: Part) -> list[tuple[int, Record]]:
    usable = [(number, record) for number, record in _records(file) if _is_usable(record)]
    if not usable:
        raise CalibrationError(f'{file} has no usable line: {{"text": ...}} or {{"messages": ...}}')
    if part == "whole":
        return usable
    if len(usable) < 2:
        raise CalibrationError(f"{file} has one usable line: two are needed to hold one out")
    held = max(1, len(usable) // 10)
    return usable[-held:] if part == "held-out" else usable[:-held]


def _from_file(
    file: Path,
    usable: Sequence[tuple[int, Record]],
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
) -> list[list[int]]:
    order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(recipe.seed))
    bos = opening(tokenizer)

    def streams() -> Iterator[list[int]]:
        for place in order.tolist():
            number, record = usable[place]
            try:
                yield _encode(record, tokenizer)
            except (jinja2.TemplateError, TypeError) as fault:
                raise CalibrationError(
                    f"{file}:{number}: the chat template refuses these messages: {fault}"
                ) from fault

    rows = pack(streams(), recipe.length, recipe.samples, bos)
    if not rows:
        raise CalibrationError(f"{file}: the chat template writes nothing for any of its lines")
    return rows


def _encode(record: Record, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if record.messages is not None:
        return tokens.of_chat(record.messages, tokenizer, asks=False)
    return tokens.of_text(record.text or "", tokenizer)


def _records(file: Path) -> Iterator[tuple[int, Record]]:
    for number, record in jsonl.read(file, Record):
        if (record.text is None) == (record.messages is None):
            raise CalibrationError(f'{file}:{number}: a line has either "text" or "messages"')
        yield number, record


def _is_usable(record: Record) -> bool:
    return record.messages is not None or bool((record.text or "").strip())


def _batches(
    rows: list[list[int]], length: int, origin: Literal["file", "self-generated"]
) -> Batches:
    input_ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for place, row in enumerate(rows):
        input_ids[place, : len(row)] = torch.tensor(row)
        mask[place, : len(row)] = True
    digest = hashlib.sha256(input_ids.numpy().tobytes() + mask.numpy().tobytes()).hexdigest()
    report = CalibrationReport(
        digest=digest, origin=origin, samples=len(rows), tokens=int(mask.sum())
    )
    return Batches(input_ids, mask, report)
