"""Text that measures a model: a file, calibration-like lines, or what the model writes itself.

Owns how a text becomes windows and which of them are drawn. Refuses a text that holds none.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from quant import calibration, textfile, tokens
from quant.calibration import Batches, Part
from quant.errors import CalibrationError
from quant.intake.source import Say, Source
from quant.proof.fidelity import Sample
from quant.recipe import Recipe

SELF_WRITTEN = "self-written text"
_LAST_SEED = 2**63


def from_text(source: Source, file: Path, rows: Recipe, say: Say) -> Sample:
    """`rows.samples` windows drawn by `rows.seed` from a UTF-8 file cut into `rows.length` tokens.

    CalibrationError where the file cannot be read or holds no text.
    """
    calibration.check_length(source, rows.length)
    tokenizer = tokens.load_tokenizer(source.folder)
    ids = tokens.of_text(_read(file), tokenizer)
    tokens.check_vocabulary(ids, source.config.get_text_config().vocab_size)
    cut = calibration.pack(iter([ids]), rows.length, calibration.opening(tokenizer))
    usable = [torch.tensor(row) for row in cut if len(row) >= 2]
    order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(rows.seed))
    chosen = sorted(order[: rows.samples].tolist())
    if len(chosen) < rows.samples:
        say(f"{file} holds {len(chosen)} windows of {rows.length} tokens, not {rows.samples}")
    return _sample(file.name, [usable[place] for place in chosen])


def from_lines(source: Source, file: Path, rows: Recipe, say: Say, part: Part = "whole") -> Sample:
    """Windows from a calibration file's lines, packed as calibration packs them."""
    return _sample(file.name, _windows(calibration.prepare(source, rows, file, say, part)))


def self_written(source: Source, rows: Recipe, calibrated: int, say: Say) -> Sample:
    """Windows that the model writes from another seed than `calibrated`, the calibration's."""
    seed = (rows.seed + calibrated + 1) % _LAST_SEED
    if seed == calibrated:  # rows.seed is the last there is
        seed = (seed + 1) % _LAST_SEED
    other = rows.model_copy(update={"seed": seed})
    return _sample(SELF_WRITTEN, _windows(calibration.prepare(source, other, None, say)))


def _read(file: Path) -> str:
    try:
        text = io.TextIOWrapper(io.BytesIO(textfile.read(file)), "utf-8").read()
    except UnicodeDecodeError as fault:
        raise CalibrationError(f"{file} is not UTF-8 text: byte {fault.start}") from fault
    if not text.strip():
        raise CalibrationError(f"{file} holds no text")
    return text


def _windows(batches: Batches) -> list[Tensor]:
    rows = zip(batches.input_ids, batches.mask, strict=True)
    return [ids[mask] for ids, mask in rows if int(mask.sum()) >= 2]


def _sample(name: str, windows: Sequence[Tensor]) -> Sample:
    if not windows:
        raise CalibrationError(f"{name} holds no two tokens in a row to measure with")
    digest = hashlib.sha256()
    for window in windows:
        digest.update(f"{len(window)}\n".encode())
        digest.update(window.numpy().tobytes())
    return Sample(name, digest.hexdigest(), tuple(windows))
