"""The picture of a comparison: what each layer lost, and how far each prediction moved.

Draws to a PNG without a display. Knows nothing of how the figures were measured.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from quant.artifact import LayerReport
from quant.errors import SpaceError
from quant.proof.evidence import TextFidelity

INK, MUTED, FAINT = "#1f2430", "#6b7280", "#d9dce3"
# Okabe and Ito's colours, told apart with any kind of colour blindness.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#7f6a00", "#000000")
_MARKS = "osD^vPX*"
_PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}  # no grid line through a label
_FLOOR = 1e-8  # nats; predictions that moved less are drawn here


@dataclass(frozen=True, slots=True)
class Findings:
    """What is drawn; `kl` is float64 [predictions] in nats."""

    name: str
    parent: str
    layers: tuple[LayerReport, ...]
    kl: NDArray[np.float64]
    text: TextFidelity


def save(found: Findings, path: Path) -> None:
    """Two panels of 150 dots per inch. SpaceError where the file cannot be written."""
    drawn = figure(12.5, 5.2)
    agreement = found.text.top1_agreement.value
    title = (
        f"{found.name} against {found.parent}: mean KL {found.text.mean_kl.value:.3g} nats,"
        f" same likeliest token {agreement:.1%}"
    )
    headed(drawn, title)
    losses, distances = drawn.subplots(1, 2)
    _losses(losses, found.layers)
    _distances(distances, found)
    write(drawn, path)


def figure(width: float, height: float) -> Figure:
    """An empty sheet, sizes in inches, that needs no display."""
    made = Figure(figsize=(width, height), dpi=150, facecolor="white")
    made.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08, wspace=0.04))
    FigureCanvasAgg(made)
    return made


def headed(figure: Figure, title: str) -> None:
    figure.suptitle(title, x=0.012, ha="left", size=13.5, weight="bold", color=INK)


def write(figure: Figure, path: Path) -> None:
    """SpaceError where the file cannot be written."""
    try:
        figure.savefig(path, format="png")
    except OSError as fault:
        raise SpaceError(f"{path} cannot be written: {fault.strerror}") from fault


def _losses(axes: Axes, layers: Sequence[LayerReport]) -> None:
    """A line for each kind of layer over the depth of the model."""
    titled(axes, "Loss of each layer", "squared error of its outputs, as a share of their energy")
    axes.set_yscale("log")
    axes.set_xlabel("block", labelpad=8)
    for place, (kind, found) in enumerate(_by_kind(layers).items()):
        depth, loss = zip(*found, strict=True)
        style = place % len(COLOURS)
        axes.plot(
            depth, loss, color=COLOURS[style], marker=_MARKS[style], markersize=3.6,
            linewidth=1.3, label=kind,
        )  # fmt: skip
    axes.minorticks_off()
    axes.legend(
        frameon=False, fontsize=8.5, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.16),
        labelcolor=INK, handlelength=1.6, columnspacing=1.2,
    )  # fmt: skip


def _distances(axes: Axes, found: Findings) -> None:
    """How many predictions moved how far, on a logarithmic axis."""
    titled(
        axes,
        "KL of each prediction",
        f"share of {found.text.predictions:,} predictions, {found.text.name}",
    )
    mean, p99 = max(found.text.mean_kl.value, _FLOOR), max(found.text.p99_kl.value, _FLOOR)
    kl = np.clip(found.kl, _FLOOR, None)
    low = max(float(np.quantile(kl, 0.002)) / 2, _FLOOR)
    high = max(float(kl.max()), p99) * 3
    edges = list(np.geomspace(low, high, 56))
    axes.hist(
        np.clip(kl, low, None), bins=edges, weights=np.full(len(kl), 1 / len(kl)),
        color=COLOURS[5], edgecolor="white", linewidth=0.5,
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.minorticks_off()
    axes.set_xlabel("KL(parent || artifact), nats", labelpad=8)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    peak = axes.get_ylim()[1]
    axes.set_ylim(0, peak * 1.12)
    _line(axes, mean, f"mean {mean:.3g} ", "right", peak * 1.07)
    _line(axes, p99, f" 99th percentile {p99:.3g}", "left", peak * 1.07)


def _line(axes: Axes, value: float, text: str, side: Literal["left", "right"], at: float) -> None:
    axes.axvline(value, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(text, (value, at), ha=side, va="center", size=9, color=INK, bbox=_PAPER)


def titled(axes: Axes, title: str, beneath: str) -> None:
    axes.set_title(title, loc="left", size=11.5, weight="bold", color=INK, pad=22)
    axes.text(0, 1.025, beneath, transform=axes.transAxes, size=9, color=MUTED)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=9, length=0)
    axes.xaxis.label.set_color(MUTED)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(FAINT)


def _by_kind(layers: Sequence[LayerReport]) -> dict[str, list[tuple[int, float]]]:
    """Last part of a layer's name -> (block, loss) of each, by depth."""
    kinds: dict[str, list[tuple[int, float]]] = {}
    for layer in layers:
        number = re.search(r"\.(\d+)\.", layer.name)
        kind = layer.name.rpartition(".")[2]
        # A loss of nothing has no place on a logarithmic axis.
        kinds.setdefault(kind, []).append((int(number[1]) if number else 0, max(layer.loss, 1e-12)))
    return kinds
