"""The picture of `adapter compare`: what each way loses, weighs and costs, a row for each way.

Draws to a PNG without a display. Knows nothing of how the figures were measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from quant.proof import plots
from quant.proof.plots import COLOURS, INK, MUTED
from quant.proof.ways import Way

_ROOM = 1.32  # of the longest bar, for its figure


def save(ways: Sequence[Way], adapter: str, parent: str, path: Path) -> None:
    """A panel for each measure, of ways that were measured on text. SpaceError: not written."""
    timed = all(way.latency for way in ways)
    panels = [_distance, _sizes, *([_first, _next] if timed else [])]
    figure = plots.figure(4.6 + 3.1 * len(panels), 1.9 + 0.75 * len(ways))
    plots.headed(figure, f"{adapter} on {Path(parent).name}: ways to serve it, quantized")
    widths = [1.5, *(1.0 for _ in panels[1:])]
    drawn = figure.subplots(1, len(panels), sharey=True, width_ratios=widths, squeeze=False)[0]
    for axes, panel in zip(drawn, panels, strict=True):
        panel(axes, ways)
        axes.set_xlim(left=0)
        axes.grid(axis="x", color=plots.FAINT, linewidth=0.7)
        axes.grid(visible=False, axis="y")
    names = [f"{Path(way.name).name}\n{way.artifact}" for way in ways]
    drawn[0].set_yticks(range(len(ways)), names, color=INK, size=10)
    drawn[0].set_ylim(len(ways) - 0.4, -0.6)  # the first on top
    plots.write(figure, path)


def _distance(axes: Axes, ways: Sequence[Way]) -> None:
    plots.titled(axes, "Mean KL", "nats from parent + adapter, 95% interval")
    texts = [way.text for way in ways if way.text]
    for place, text in enumerate(texts):
        kl = text.mean_kl
        axes.plot([kl.low, kl.high], [place, place], color=COLOURS[0], linewidth=2.5)
        axes.plot([kl.value], [place], color=COLOURS[0], marker="o", markersize=7)
        told = f"{kl.value:.3g}"
        axes.annotate(
            told, (kl.value, place), (0, 9), textcoords="offset points", ha="center", size=9.5,
            color=INK,
        )  # fmt: skip
    axes.set_xlim(right=1.12 * max(text.mean_kl.high for text in texts))


def _sizes(axes: Axes, ways: Sequence[Way]) -> None:
    plots.titled(axes, "Weights, MB", "blue: one adapter, orange: each further one")
    _bars(axes, [way.bytes / 1e6 for way in ways], COLOURS[5], -0.17)
    _bars(axes, [way.bytes_more / 1e6 for way in ways], COLOURS[1], 0.17)
    axes.set_xlim(right=_ROOM * max(way.bytes for way in ways) / 1e6)


def _first(axes: Axes, ways: Sequence[Way]) -> None:
    found = [way.latency for way in ways if way.latency]
    plots.titled(axes, "First token, ms", f"after a prompt of {found[0].prompt_tokens} tokens")
    times = [each.first_token_ms for each in found]
    _bars(axes, times, COLOURS[2], 0, 0.44)
    axes.set_xlim(right=_ROOM * max(times))


def _next(axes: Axes, ways: Sequence[Way]) -> None:
    found = [way.latency for way in ways if way.latency]
    plots.titled(axes, "Each further token, ms", "one stream, median")
    times = [each.next_token_ms for each in found]
    _bars(axes, times, COLOURS[2], 0, 0.44)
    axes.set_xlim(right=_ROOM * max(times))


def _bars(
    axes: Axes, values: Sequence[float], colour: str, lower: float, height: float = 0.3
) -> None:
    """A bar for each way, its figure at the end."""
    places = [place + lower for place in range(len(values))]
    drawn = axes.barh(places, values, height=height, color=colour)
    axes.bar_label(drawn, [f"{value:.1f}" for value in values], padding=4, size=9.5, color=MUTED)
