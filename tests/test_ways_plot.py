"""`proof.ways_plot`: a panel for each measure, a row for each way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from numpy.typing import NDArray

from quant.errors import SpaceError
from quant.proof import ways_plot
from quant.proof.served import Latency
from quant.proof.ways import Way
from tests.test_evidence import text


def way(name: str, kl: float, first: float | None = 60.0) -> Way:
    timed = first and Latency(
        requests=8, prompt_tokens=128, answer_tokens=64, first_token_ms=first,
        next_token_ms=first / 5, tokens_per_s=900 / first,
    )  # fmt: skip
    return Way(
        name=name, artifact="mine-w4a16", bytes=176_100_000, bytes_more=4_900_000,
        latency=timed or None, text=text(kl=kl), choices=(),
    )  # fmt: skip


def drawn(path: Path, *ways: Way) -> NDArray[np.float32]:
    ways_plot.save(ways, "legal", "mine", path)
    pixels: NDArray[np.float32] = image.imread(path)
    return pixels


def coloured(pixels: NDArray[np.float32]) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = np.ptp(pixels[..., :3], axis=2) > 0.2
    return found


def test_every_panel_and_every_way_is_drawn(tmp_path: Path) -> None:
    ways = [way("beside", 0.09), way("/home/me/plus-8", 0.04), way("merged", 0.05)]
    pixels = drawn(tmp_path / "ways.png", *ways)
    height, width, _ = pixels.shape
    for part in np.array_split(pixels[:, int(width * 0.14) :], 4, axis=1):
        assert coloured(part).sum() > 500, "a panel without a mark"
    rows = coloured(pixels[int(height * 0.25) : int(height * 0.92)]).any(axis=1)
    assert (np.diff(rows.astype(int)) == 1).sum() >= 3, "ways that run into one another"


def test_without_latency_its_panels_are_left_out(tmp_path: Path) -> None:
    whole = drawn(tmp_path / "all.png", way("beside", 0.09))
    part = drawn(tmp_path / "two.png", way("beside", 0.09, None))
    assert part.shape[1] < 0.7 * whole.shape[1] and coloured(part).sum() > 500


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(SpaceError, match=r"taken\.png cannot be written"):
        drawn(tmp_path / "taken.png", way("beside", 0.09))
