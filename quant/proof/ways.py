"""The ways to serve an adapter held against each other: beside an artifact, or merged into one.

All are measured against the parent with the adapter merged in float32. Nothing is written but what
`merge_into` asks for. Servers are timed before any model is loaded here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel

from quant import paths, pipeline, recipe
from quant.artifact import Manifest
from quant.intake.source import Source
from quant.lora import adapter as lora
from quant.lora import export, factors, footing, obstacles
from quant.lora.adapter import Adapter
from quant.lora.factors import Factors
from quant.proof import compare, replica, served
from quant.proof.evidence import ChoiceFidelity, TextFidelity
from quant.proof.fidelity import Pair, Quiz, Sample
from quant.proof.served import Latency, Served
from quant.recipe import Draw
from quant.solver import devices


class Progress(compare.Progress, pipeline.Progress, Protocol):
    """Who is told what happens."""


@dataclass(frozen=True, slots=True)
class Order:
    """`asked` names the parent, the artifact, the one adapter and the files to measure on.

    `ready` are exported folders of the same adapter; `merged` an artifact that it was merged into,
    `merge_into` where to make one by the artifact's recipe, calibrated on the lines of
    `merge_texts`. `latency`: time a server of each.
    """

    asked: compare.Order
    ready: tuple[Path, ...] = ()
    merged: Path | None = None
    merge_into: Path | None = None
    merge_texts: Path | None = None
    latency: bool = False


class Way(BaseModel):
    """One way, its distance from parent + adapter, and what it costs.

    `bytes` serve one adapter, `bytes_more` each further one.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    artifact: str
    bytes: int
    bytes_more: int
    latency: Latency | None
    text: TextFidelity | None
    choices: tuple[ChoiceFidelity, ...]


@dataclass(frozen=True, slots=True)
class _Beside:
    """An adapter, and what an engine adds of it."""

    adapter: Adapter
    held: Factors

    def bytes(self) -> int:
        return sum(2 * (a.numel() + b.numel()) for a, b in self.held.values())


@dataclass(frozen=True, slots=True)
class _Measure:
    """What all ways are held against, and on what."""

    reference: PreTrainedModel
    windows: Sample | None
    questions: Sequence[Quiz]
    latencies: Mapping[str, Latency]
    seed: int
    progress: Progress

    def __call__(
        self, name: str, folder: Path, model: PreTrainedModel, sizes: tuple[int, int]
    ) -> Way:
        self.progress.say(f"measuring: {name}")
        pair, told = Pair(self.reference, model), self.progress
        text = compare.on_text(pair, self.windows, self.seed, told)[0] if self.windows else None
        return Way(
            name=name,
            artifact=folder.name,
            bytes=sizes[0],
            bytes_more=sizes[1],
            latency=self.latencies.get(name),
            text=text,
            choices=tuple(
                compare.on_choices(pair, quiz, self.seed, told) for quiz in self.questions
            ),
        )


def run(draw: Draw, order: Order, progress: Progress) -> list[Way]:
    """Each way's figures: beside the artifact, as exported, merged, as far as they were asked for.

    CompareError where parent, artifact and adapter do not belong together, or a server does not
    start; AdapterError where the adapter cannot be served beside a base.
    """
    if order.latency:
        served.check()
    device, asked = devices.first(draw.device), order.asked
    folder = paths.full(asked.artifact).resolve()
    manifest = compare.intact(folder)
    progress.say(f"opening {asked.parent}")
    opened = compare.opened_as(asked, progress)
    compare.check_parent(replace(opened, adapters=()), manifest, folder)
    beside = _beside(opened, order.ready, folder, progress)
    merged = _merged(order, opened, manifest, progress)
    questions = compare.quizzes(opened, asked.choices)
    windows = compare.sample(opened, manifest, draw, asked, progress)
    latencies: dict[str, Latency] = {}
    if order.latency and windows is not None:
        latencies = _latencies(folder, beside, merged, windows, progress)
    progress.say("loading parent and adapter in float32")
    reference = replica.of_parent(opened, device)
    measured = _Measure(reference, windows, questions, latencies, draw.seed, progress)
    found = []
    for name, pair in beside.items():
        model = replica.of_artifact(opened, folder, manifest, device)
        replica.beside(model, pair.held)
        more = pair.bytes()
        found.append(measured(name, folder, model, (manifest.bytes_after + more, more)))
    if merged is not None:
        place, whole = merged
        model = replica.of_artifact(opened, place, whole, device)
        found.append(measured("merged", place, model, (whole.bytes_after, whole.bytes_after)))
    return found


def _beside(
    opened: Source, ready: Sequence[Path], folder: Path, progress: Progress
) -> dict[str, _Beside]:
    """What the engine adds beside the artifact, by the way's name: the adapter, and as exported."""
    base = footing.base_of(folder)
    given = {"beside": opened.adapters[0]}
    given |= {str(place): lora.read_trained(place) for place in ready}
    found: dict[str, _Beside] = {}
    for name, adapter in given.items():
        exact = factors.of(adapter, base, progress.measured)
        # An engine holds them in the type it computes in.
        held = {
            module: (a.to(base.dtype).float(), b.to(base.dtype).float())
            for module, (a, b) in exact.items()
        }
        found[name] = _Beside(adapter, held)
    return found


def _merged(
    order: Order, opened: Source, manifest: Manifest, progress: Progress
) -> tuple[Path, Manifest] | None:
    """The artifact that the adapter was merged into, made first where that was asked for."""
    asked, place = order.asked, order.merged or order.merge_into
    if place is None:
        return None
    place = paths.full(place).resolve()
    if order.merged is None:
        if manifest.calibration.origin == "file" and order.merge_texts is None:
            progress.say(
                "merging: the model writes its own calibration text; --merge-calibration names the"
                " file that calibrated the other"
            )
        job = pipeline.Order(
            asked.parent,
            place,
            asked.adapters,
            asked.training,
            calibration_file=order.merge_texts,
            cache=asked.cache,
        )
        return place, pipeline.run(recipe.build(manifest.recipe), job, progress)
    found = compare.intact(place)
    compare.check_parent(opened, found, place)
    return place, found


def _latencies(
    folder: Path,
    beside: Mapping[str, _Beside],
    merged: tuple[Path, Manifest] | None,
    windows: Sample,
    progress: Progress,
) -> dict[str, Latency]:
    """A server of each way after the other."""
    found = {}
    for name, pair in beside.items():
        with tempfile.TemporaryDirectory(prefix="quantserve-") as place:
            ready, rank = to_serve(pair.adapter, folder, Path(place) / "ready", progress)
            progress.say(f"serving: {name}")
            found[name] = served.measured(Served(folder, ready, rank), windows.windows)
    if merged is not None:
        progress.say("serving: merged")
        found["merged"] = served.measured(Served(merged[0]), windows.windows)
    return found


def to_serve(adapter: Adapter, folder: Path, target: Path, progress: Progress) -> tuple[Path, int]:
    """What a server of the artifact takes, and the rank that it has to be started with."""
    place = adapter.folder
    if adapter.config.start is not None:
        export.run(export.Order(place, folder, target, initial=adapter.initial), progress)
        place = target
    return place, obstacles.served_rank(lora.read(place).rank) or 0


Column = tuple[str, list[str]]


def table(ways: Sequence[Way]) -> Iterator[Column]:
    """A row of figures for each measure, a figure for each way."""
    texts = [way.text for way in ways if way.text]
    if texts:
        yield "mean KL(parent + adapter || way), nats", [f"{t.mean_kl.value:.4g}" for t in texts]
        yield "  95% interval", [f"{t.mean_kl.low:.4g} .. {t.mean_kl.high:.4g}" for t in texts]
        yield "same likeliest token", [f"{t.top1_agreement.value:.2%}" for t in texts]
        yield (
            "perplexity, way / parent + adapter",
            [f"{t.perplexity_ratio.value:.4f}" for t in texts],
        )
    for place, quiz in enumerate(ways[0].choices):
        yield (
            f"{quiz.name}: answers that flip",
            [f"{w.choices[place].flips.value:.1%}" for w in ways],
        )
        yield f"{quiz.name}: accuracy", [f"{w.choices[place].accuracy.value:.1%}" for w in ways]
    yield "weights of one adapter, MB", [f"{way.bytes / 1e6:.1f}" for way in ways]
    yield "of each further one, MB", [f"{way.bytes_more / 1e6:.1f}" for way in ways]
    timed = [way.latency for way in ways if way.latency]
    if timed:
        yield "served: first token, ms", [f"{each.first_token_ms:.0f}" for each in timed]
        yield "  each further token, ms", [f"{each.next_token_ms:.1f}" for each in timed]
        yield "  tokens/s of one stream", [f"{each.tokens_per_s:.1f}" for each in timed]
