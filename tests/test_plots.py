"""`quant.proof.plots`: a PNG of whatever was found, without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image
from numpy.typing import NDArray

from quant.artifact import LayerReport
from quant.errors import SpaceError
from quant.proof import plots
from quant.proof.plots import Findings
from tests.test_evidence import text


def layers(loss: float = 1e-3) -> tuple[LayerReport, ...]:
    return tuple(
        LayerReport(
            name=f"model.layers.{n}.mlp.{k}", loss=loss * (n + 1), rounding_loss=1, damping=0
        )
        for n in range(4)
        for k in ("up_proj", "down_proj")
    )


def drawn(path: Path, kl: NDArray[np.float64], **changes: Any) -> NDArray[np.float32]:
    plots.save(Findings("mine", "demo", changes.get("layers", layers()), kl, text()), path)
    pixels: NDArray[np.float32] = image.imread(path)
    return pixels


def test_both_panels_are_drawn(tmp_path: Path) -> None:
    kl = np.exp(np.random.default_rng(0).normal(-3, 1, 4000))
    pixels = drawn(tmp_path / "found.png", kl)
    height, width, _ = pixels.shape
    assert width == 1875 and height == 780
    for half in (pixels[:, : width // 2], pixels[:, width // 2 :]):
        coloured = np.ptp(half[..., :3], axis=2) > 0.2
        assert coloured.sum() > 1000, "a panel without a curve or a bar"


@pytest.mark.parametrize("kl", [np.zeros(100), np.full(5, 3.0), np.array([0.0, 1e-300, 40.0])])
def test_no_distances_break_the_axis(kl: NDArray[np.float64], tmp_path: Path) -> None:
    assert drawn(tmp_path / "found.png", kl).size


def test_a_loss_of_nothing_is_drawn(tmp_path: Path) -> None:
    assert drawn(tmp_path / "found.png", np.ones(9), layers=layers(loss=0.0)).size


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(SpaceError, match=r"taken\.png cannot be written"):
        drawn(tmp_path / "taken.png", np.ones(9))
