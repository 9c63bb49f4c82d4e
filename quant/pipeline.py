"""From a source to a sealed artifact: the one place where everything else meets, top to bottom.

Streams: a block's weights are read, solved, written and dropped before the next one's are read.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import torch

from quant import (
    artifact,
    calibration,
    checkpoint,
    command,
    estimate,
    formats,
    interrupt,
    journal,
    paths,
    shards,
    staging,
)
from quant.artifact import Manifest, MergedAdapter
from quant.calibration import Batches, Part
from quant.errors import SpaceError, during
from quant.formats import FULL, Plan
from quant.intake import architecture, source
from quant.intake.source import Source
from quant.journal import Journal, Unread
from quant.lora import starts
from quant.lora.adapter import UNITS
from quant.lora.training import AS_STORED, Training
from quant.proof import card, first_answers, gate
from quant.proof.gate import Gate
from quant.recipe import Recipe
from quant.solver import allotment, blocks, devices, preflight, selfcheck, walk
from quant.solver.blocks import Decoder
from quant.solver.layers import Layers, half
from quant.solver.layers import Progress as Watching
from quant.staging import Stage


@dataclass(frozen=True, slots=True)
class Order:
    """What to quantize, from where to where."""

    spec: str
    target: Path
    adapters: tuple[Path, ...] = ()
    training: Training = AS_STORED  # the adapters'
    calibration_file: Path | None = None
    cache: Path | None = None
    force: bool = False
    fresh: bool = False  # give up what an earlier run was cut short in
    max_kl: float | None = None  # nats; what is further from its parent is not published


class Progress(Watching, Protocol):
    """Who is told what happens."""

    def foreseen(self, line: str, facts: Mapping[str, float]) -> None:
        """What the run needs, in words and in numbers, once it is known to fit."""


def run(recipe: Recipe, order: Order, progress: Progress) -> Manifest:
    """Quantizes a model into a new folder and returns its manifest.

    The same command goes on where an earlier one was cut short, and makes the same files. A
    QuantError leaves neither a target nor a partial one behind; an interrupt, a full disk and a
    crash leave what the next run goes on from, once a block is done, and say so in a note.
    """
    on = _devices(recipe, progress)
    target = paths.full(order.target).absolute()
    staging.check_target(target, force=order.force)
    progress.say(f"opening {order.spec}")
    opened = _opened(order, progress)
    calibration.check(opened, recipe, order.calibration_file)
    decoder = _decoder(recipe, opened, on)
    plan = allotment.bound(recipe, decoder.shapes(), progress.say)
    layers = _layers(recipe, plan, opened, decoder, progress)
    with staging.resumable(target) as stage:
        writes, gated = order.calibration_file is None, order.max_kl is not None
        asked = estimate.Run(recipe, opened, decoder, layers.bytes_after(opened), writes, gated)
        needs = estimate.checked(asked, target, stage.bytes(), min(map(devices.left, on)))
        progress.foreseen(str(needs), needs.facts())
        barrier = _gate(recipe, order, opened, progress)
        kept = _journal(asked, order, stage, progress)
        rows = kept.rows()
        if recipe.bits_per_weight is not None:
            measured = partial(allotment.within, recipe, decoder, opened, rows, progress.say)
            layers = _layers(recipe, kept.plan(measured), opened, decoder, progress)
        with layers:
            _solve(layers, asked, kept, rows)
        if recipe.scheme == "w8a8":
            shards.write(stage.folder / UNITS, kept.units())
        made = kept.assemble()
        found = {
            **_formats(recipe, layers.plan, decoder),
            "layers": tuple(layers.reports),
            "bytes_after": made.bytes,
            "files": made.digests,
            "seconds": round(kept.seconds, 1),
        }
        _complete(stage.folder, layers, asked, progress)
        facts = _facts(recipe, order, opened, rows).model_copy(update=found)
        sealed = _sealed(target.name, _asked(facts, stage.folder, asked, progress), stage.folder)
        return barrier.admit(opened, stage.folder, sealed) if barrier else sealed


def _devices(recipe: Recipe, progress: Progress) -> list[torch.device]:
    on = devices.named(recipe.device)
    if (unused := devices.idle(on)) is not None:
        progress.say(f"computing on the CPU: --device cuda would use the {unused} that is here")
    return on


def _opened(order: Order, progress: Progress) -> Source:
    return source.open(
        order.spec,
        adapters=order.adapters,
        training=order.training,
        cache=order.cache,
        say=progress.say,
    )


def _decoder(recipe: Recipe, opened: Source, on: Sequence[torch.device]) -> Decoder:
    """On all devices."""
    dtype = devices.forward_dtype(on[0], exact=recipe.exact)
    return blocks.spread(opened, on, dtype)


def _gate(recipe: Recipe, order: Order, opened: Source, progress: Progress) -> Gate | None:
    """The rows that calibrate nothing and decide, where that was asked for."""
    if order.max_kl is None:
        return None
    held = gate.rows(opened, recipe, order.calibration_file, progress.say)
    return Gate(held, order.max_kl, paths.full(order.target).absolute(), progress.say)


def _journal(asked: estimate.Run, order: Order, stage: Stage, progress: Progress) -> Journal:
    """Of the same command's earlier run, or a new one with the rows that calibrate."""
    recipe, opened, file = asked.recipe, asked.opened, order.calibration_file

    def rows() -> Batches:
        progress.say("holding the blocks, one at a time, against the whole model")
        selfcheck.run(asked.decoder, opened)
        part: Part = "calibrating" if asked.gated else "whole"
        made = calibration.prepare(opened, recipe, file, progress.say, part)
        widths = (columns for _, columns in asked.decoder.shapes().values())
        return calibration.held_against(made, widths, progress.say)

    depth = opened.config.get_text_config().num_hidden_layers
    if order.fresh:
        stage.take(anew=True)
    facts = command.facts(recipe, opened, file, gated=asked.gated)
    return journal.opened(stage, facts, depth, rows, progress.say)


def _layers(
    recipe: Recipe, plan: Plan, opened: Source, decoder: Decoder, progress: Progress
) -> Layers:
    """The plan's, and what a server would take for layers, told apart as no others are."""
    places = range(len(decoder.blocks))
    gates = {name: FULL for place in places for name in decoder.left_out(place)}
    return Layers(recipe, {**plan, **gates}, half(opened), decoder.shapes(), progress)


def _solve(layers: Layers, asked: estimate.Run, kept: Journal, rows: Batches) -> None:
    """Keeps every tensor of the parent, the blocks' linear layers quantized."""
    decoder, opened = asked.decoder, asked.opened
    inside = [sorted(decoder.names(place).values()) for place in range(len(decoder.blocks))]
    within = {name for names in inside for name in names}
    names = opened.tensors.names()
    tied = decoder.stored_as("lm_head.weight") if architecture.is_tied(opened.config) else None
    # Loaders make a tied head out of the embedding again.
    outside = [name for name in names if name not in within and name != tied]
    solved = {f"{name}.weight" for name, form in layers.plan.items() if form != FULL}
    for name in sorted(within - solved):
        layers.kept(opened, name)  # refuses what cannot be served before hours are spent
    kept.outside([_unread(layers, opened, name) for name in outside], layers.bytes_after(opened))
    samples, length = rows.input_ids.shape
    given = replace(asked.given, samples=samples, length=length)
    batches = zip(
        *(torch.split(t, given.per_stream) for t in (rows.input_ids, rows.counted)), strict=True
    )
    with kept.shelves(preflight.places(asked.units(), given)) as shelves:
        streams = blocks.embed(decoder, opened, list(batches), shelves)
        kept.resume(layers, streams[0])
        for place in range(kept.entry.done, len(decoder.blocks)):
            interrupt.check()
            with during(f"solving block {place + 1} of {len(decoder.blocks)}"):
                walk.run(decoder, place, opened, streams, layers)
            tensors = dict(pair for name in inside[place] for pair in layers.encoded(opened, name))
            kept.finished(tensors, layers, streams[0])


def _unread(layers: Layers, opened: Source, name: str) -> Unread:
    size = math.prod(opened.tensors.shape(name)) * layers.dtype.itemsize
    return Unread(name, size, partial(layers.kept, opened, name))


def _complete(folder: Path, layers: Layers, asked: estimate.Run, progress: Progress) -> None:
    """Adds what a server needs beside the tensors, and reads every layer back."""
    progress.say("reading back every layer")
    decoder, opened = asked.decoder, asked.opened
    drafts = decoder.drafts(opened.tensors.names())
    section = formats.section(asked.recipe.scheme, layers.plan, decoder.towers(), drafts)
    with _having_room(folder):
        checkpoint.write_config(opened.folder, folder, section, layers.dtype)
        checkpoint.copy_companions(opened.folder, folder)
        checkpoint.verify(folder, layers.digests, layers.plan)


def _sealed(name: str, manifest: Manifest, folder: Path) -> Manifest:
    with _having_room(folder):
        card.write(folder, manifest, name)
        return artifact.seal(folder, manifest, manifest.files)


@contextmanager
def _having_room(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as fault:
        raise SpaceError(f"{folder} cannot hold what belongs to the model: {fault}") from fault


def _asked(manifest: Manifest, folder: Path, run: estimate.Run, progress: Progress) -> Manifest:
    """The manifest with how the artifact begins its answers, which is said."""
    progress.say("asking both models how they begin their answers, a block at a time")
    found = first_answers.compared(run.decoder, run.opened, folder, manifest)
    if found is not None:
        widths = {columns for _, columns in run.decoder.shapes().values()}
        progress.say(first_answers.told(found, manifest, widths))
    return manifest.model_copy(update={"first_answers": found})


def _formats(recipe: Recipe, plan: Plan, decoder: Decoder) -> dict[str, float]:
    most = formats.most_common(recipe.scheme, plan)
    shapes = decoder.shapes()
    weighed = formats.bits_per_weight({name: plan[name] for name in shapes}, shapes)
    return {"bits": most.bits, "group_size": most.group, "bits_per_weight": weighed}


def _facts(recipe: Recipe, order: Order, opened: Source, rows: Batches) -> Manifest:
    merged = (
        MergedAdapter(
            name=adapter.folder.name,
            digest=adapter.digest,
            rank=max(pair.rank for pair in adapter.pairs.values()),
            modules=len(adapter.pairs),
            initial=starts.identity(adapter),
        )
        for adapter in opened.adapters
    )
    return Manifest(
        created=datetime.now(UTC),
        quantserve=version("quantserve"),
        architecture=opened.architecture,
        source=order.spec,
        parent=opened.fingerprint,
        adapters=tuple(merged),
        training_base=opened.training.base,
        recipe=recipe.model_dump(mode="json"),
        scheme=recipe.scheme,
        bits=recipe.bits,
        group_size=-1,
        calibration=rows.report,
        layers=(),
        bytes_before=opened.bytes,
        bytes_after=0,
        seconds=0.0,
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "safetensors": version("safetensors"),
        },
    )
