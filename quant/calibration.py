"""Calibration tokens: from a JSONL file, or written by the model itself when there is none.

Owns the packing into rows, and which of their tokens count. A record that cannot be used is refused
with its number; a set that comes out shorter than asked is reported and used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quant import assistant, beforehand, jsonl, scribe, tokens
from quant.artifact import CalibrationReport
from quant.conversation import Chat
from quant.errors import CalibrationError, RecipeError, TemplateRefusal
from quant.intake import architecture
from quant.intake.source import Source
from quant.recipe import Recipe
from quant.records import EXPECTED, Document, Record


@dataclass(frozen=True, slots=True)
class Batches:
    """Token rows, which of their tokens are real, and which of those count for the solver.

    Real tokens are a prefix of each row, so causal attention needs no further mask; it sees them
    all. Those that count are some of them, at least one of each row.
    """

    input_ids: Tensor  # [samples, length] int64
    mask: Tensor  # [samples, length] bool, true where a token is real
    counted: Tensor  # [samples, length] bool
    report: CalibrationReport


# The whole file, or its last tenth, or what comes before that.
Part = Literal["whole", "held-out", "calibrating"]


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
    check(source, recipe, file)
    tokenizer = tokens.load_tokenizer(source.folder)
    if file is None:
        ids = scribe.rows(source, tokenizer, recipe, say)
        batches = _batches(list(ids.tolist()), recipe.length, "self-generated")
    else:
        usable = _part(file, part, say)
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


def check(source: Source, recipe: Recipe, file: Path | None) -> None:
    """RecipeError for rows that cannot be made."""
    check_length(source, recipe.length)
    if recipe.assistant_only:
        beforehand.check_answers(file)


def held_against(rows: Batches, widths: Iterable[int], say: Callable[[str], None]) -> Batches:
    """The rows, their report beside the widest of the layers' `widths` (in_features).

    Says so where they are too few: fewer tokens than a layer has inputs leave directions of its
    inputs of which nothing is known, and the damping alone decides there.
    """
    widest, count = max(widths), rows.report.tokens
    if count < widest:
        say(
            f"calibration has {count} tokens, and the widest layer {widest} inputs: give at least"
            f" {widest} tokens by a larger file, --samples or --length, or expect a poor result"
        )
    return replace(rows, report=rows.report.model_copy(update={"widest_input": widest}))


def check_length(source: Source, length: int) -> None:
    """RecipeError for sequences that are longer than the model can read."""
    positions = architecture.positions(source.config)
    if length > positions:
        raise RecipeError(f"length {length} exceeds the model's {positions} positions")


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What starts every sequence: one token, or none."""
    # A tokenizer that also ends documents leaves [BOS, EOS] of an empty one.
    empty = tokens.of_text("", tokenizer)
    return empty[:1] if empty[:1] == [tokenizer.bos_token_id] else []


def pack(streams: Iterator[list[int]], length: int, bos: list[int]) -> Iterator[list[int]]:
    """Documents one after the other, cut into rows of `length`; the last row may be shorter.

    A row that starts inside a document gets `bos` before it, as every served sequence does. A
    document is asked for when a row has room for it.
    """
    row: list[int] = []
    for stream in streams:
        rest = stream
        while rest:
            room = length - len(row)
            row, rest = row + rest[:room], rest[room:]
            if len(row) == length:
                yield row
                row = list(bos) if rest else []
    if row:
        yield row


def _part(file: Path, part: Part, say: Callable[[str], None]) -> Sequence[tuple[int, Document]]:
    there, usable = 0, []
    for number, record in jsonl.read(file, Record):
        blank = _is_blank(record.document)
        there += not blank
        if not blank and not record.has_media:
            usable.append((number, record.document))
    if not usable:
        media = " without an image or a sound" if there else ""
        raise CalibrationError(f"{file} has no usable line{media}; expected {EXPECTED}")
    if len(usable) < there:
        say(f"{there - len(usable)} of {there} lines of {file} are left out: they have"
            " images or sounds, and calibration reads text")  # fmt: skip
    if part == "whole":
        return usable
    if len(usable) < 2:
        raise CalibrationError(f"{file} has one usable line: two are needed to hold one out")
    held = max(1, len(usable) // 10)
    return usable[-held:] if part == "held-out" else usable[:-held]


def _from_file(
    file: Path,
    usable: Sequence[tuple[int, Document]],
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
) -> list[list[int]]:
    """Rows of tokens; one that does not count is its complement, a negative number."""
    order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(recipe.seed))
    bos = opening(tokenizer)
    if recipe.assistant_only:
        bos = [~token for token in bos]

    def streams() -> Iterator[list[int]]:
        for place in order.tolist():
            number, document = usable[place]
            try:
                yield _encoded(document, tokenizer, recipe)
            except TemplateRefusal as fault:
                raise CalibrationError(
                    f"{file}:{number}: the chat template refuses these messages: {fault}; mend the"
                    " line or take it out"
                ) from fault

    packed = pack(streams(), recipe.length, bos)
    rows = list(islice((row for row in packed if max(row) >= 0), recipe.samples))
    if not rows and recipe.assistant_only:
        raise CalibrationError(f"{file} has no answer of an assistant in any of its lines")
    if not rows:
        raise CalibrationError(f"{file}: the chat template writes nothing for any of its lines")
    return rows


def _encoded(document: Document, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> list[int]:
    """No more of it than could be used; where answers alone count, that may be at its end."""
    if recipe.assistant_only:
        ids, own = assistant.written(document, tokenizer)
        return [token if counts else ~token for token, counts in zip(ids, own, strict=True)]
    most = recipe.samples * recipe.length
    if isinstance(document, Chat):
        return tokens.of_chat(document, tokenizer, asks=False, most=most)
    return tokens.of_text(document.text, tokenizer, most)


def _is_blank(document: Document) -> bool:
    return not isinstance(document, Chat) and not document.text.strip()


def _batches(
    rows: list[list[int]], length: int, origin: Literal["file", "self-generated"]
) -> Batches:
    told = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for place, row in enumerate(rows):
        told[place, : len(row)] = torch.tensor(row)
        mask[place, : len(row)] = True
    input_ids, counted = torch.where(told < 0, ~told, told), mask & (told >= 0)
    digest = hashlib.sha256(input_ids.numpy().tobytes() + counted.numpy().tobytes()).hexdigest()
    report = CalibrationReport(
        digest=digest, origin=origin, samples=len(rows), tokens=int(counted.sum())
    )
    return Batches(input_ids, mask, counted, report)
