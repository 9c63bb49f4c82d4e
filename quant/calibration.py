"""Calibration tokens: from a JSONL file, or written by the model itself from our prompts.

(The signatures other modules code against; `prepare` is filled in next.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from quant.artifact import CalibrationReport
from quant.recipe import Recipe
from quant.source import Source


@dataclass(frozen=True, slots=True)
class Batches:
    """Token rows and which of their tokens count."""

    input_ids: Tensor  # [samples, length] int64
    mask: Tensor  # [samples, length] bool; true where a token is real, always a prefix of a row
    report: CalibrationReport


def prepare(
    source: Source, recipe: Recipe, file: Path | None, say: Callable[[str], None]
) -> Batches:
    """Rows for the recipe: the file's, or the model's own when there is none (cached)."""
    raise NotImplementedError
