"""Holds an artifact against the model it was made from, and writes down what was found.

Refuses another parent than the manifest names. The artifact changes last and by renames: its
card, then its manifest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from quant import artifact, beforehand, paths, tokens
from quant.artifact import Manifest
from quant.errors import CompareError, SpaceError, TooLossy
from quant.intake import architecture, source
from quant.intake.source import Source
from quant.lora import starts
from quant.lora.training import AS_STORED, Training
from quant.proof import card, choices, fidelity, held_out, replica
from quant.proof.evidence import ChoiceFidelity, Fidelity, TextFidelity
from quant.proof.fidelity import Pair, Quiz, Sample, Trace
from quant.recipe import Draw
from quant.solver import devices


class Progress(Protocol):
    """Who is told what happens."""

    def say(self, line: str) -> None: ...

    def measured(self, name: str, done: int, total: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Order:
    """What to hold against what, on which files; without any the model writes a text itself."""

    parent: str
    artifact: Path
    adapters: tuple[Path, ...] = ()
    training: Training = AS_STORED  # the adapters'
    text: Path | None = None
    calibration: Path | None = None
    choices: tuple[Path, ...] = ()
    cache: Path | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """The artifact's new manifest, what was measured now, and the trace where text was."""

    manifest: Manifest
    fidelity: Fidelity
    trace: Trace | None


def run(draw: Draw, order: Order, progress: Progress) -> Found:
    """Measures, and stores the result in the artifact's manifest and card.

    Any QuantError, and an interrupt, leave the artifact as it was.
    """
    device = devices.first(draw.device)
    folder = paths.full(order.artifact).resolve()
    manifest = intact(folder)
    progress.say(f"opening {order.parent}")
    order = replace(order, training=replace(order.training, base=manifest.training_base))
    opened = opened_as(order, progress)
    check_parent(opened, manifest, folder)
    questions = quizzes(opened, order.choices)
    windows = sample(opened, manifest, draw, order, progress)
    progress.say("loading both models in float32")
    pair = Pair(
        replica.of_parent(opened, device), replica.of_artifact(opened, folder, manifest, device)
    )
    text, trace = None, None
    if windows is not None:
        text, trace = on_text(pair, windows, draw.seed, progress)
    answers = [on_choices(pair, quiz, draw.seed, progress) for quiz in questions]
    now = fidelity.now(text, answers)
    return Found(store(folder, manifest, now, folder.name), now, trace)


def opened_as(order: Order, progress: Progress) -> Source:
    """The parent with its adapters merged."""
    return source.open(
        order.parent,
        adapters=order.adapters,
        training=order.training,
        cache=order.cache,
        say=progress.say,
    )


def on_text(
    pair: Pair, sample: Sample, seed: int, progress: Progress
) -> tuple[TextFidelity, Trace]:
    trace = fidelity.trace(
        pair, sample.windows, lambda done, total: progress.measured(sample.name, done, total)
    )
    return fidelity.of_text(trace, sample, seed), trace


def on_choices(pair: Pair, quiz: Quiz, seed: int, progress: Progress) -> ChoiceFidelity:
    picks = fidelity.picks(
        pair, quiz.questions, lambda done, total: progress.measured(quiz.name, done, total)
    )
    return fidelity.of_choices(picks, quiz, seed)


def store(folder: Path, manifest: Manifest, found: Fidelity, name: str) -> Manifest:
    """Adds what was found to the manifest and the card of the artifact called `name`.

    SpaceError where the folder cannot be written.
    """
    known = manifest.model_copy(update={"fidelity": found.beside(manifest.fidelity)})
    try:
        written = card.write(folder, known, name)
        return artifact.amend(folder, known, [card.NAME] if written else [])
    except OSError as fault:
        raise SpaceError(f"{folder} cannot hold the result: {fault}") from fault


def check_parent(opened: Source, manifest: Manifest, folder: Path) -> None:
    """CompareError unless the artifact was made from this model with these adapters."""
    found, expected = opened.fingerprint, manifest.parent
    if found != expected:
        raise CompareError(
            f"{opened.spec} is not what {folder} was made from: its weights are"
            f" {found.weights[:12]} and its tokenizer {found.tokenizer[:12]}, the manifest says"
            f" {expected.weights[:12]} and {expected.tokenizer[:12]}; give the model it calls"
            f" {manifest.source}"
        )
    merged = [adapter.digest for adapter in manifest.adapters]
    given = [adapter.digest for adapter in opened.adapters]
    if merged != given:
        raise CompareError(
            f"{folder} has {_brief(merged)} merged, --adapter gives {_brief(given)}; give the"
            " adapters of `quantize`, in its order"
        )
    if merged and manifest.training_base != opened.training.base:
        raise CompareError(
            f"{folder} has them merged with --training-base {manifest.training_base}, here it is"
            f" {opened.training.base}; give that of `quantize`"
        )
    for was, now in zip(manifest.adapters, opened.adapters, strict=True):
        if was.initial not in (None, starts.identity(now)):
            raise CompareError(
                f"{folder} has {was.name} merged less what it started from, {was.initial[:12]}, and"
                " that is not what lies beside it here; give that with --initial"
            )


def check_limit(found: TextFidelity | None, limit: float | None, hint: str) -> None:
    """TooLossy where the mean KL is above `limit`, in nats."""
    if found is not None and limit is not None and found.mean_kl.value > limit:
        raise TooLossy(f"mean KL {found.mean_kl.value:.4g} is above {limit:g} nats; {hint}")


def intact(folder: Path) -> Manifest:
    """The manifest of an artifact whose files are those that were sealed, its card aside."""
    manifest = beforehand.artifact_of(folder)
    # A run that was killed between its two renames left a card that the manifest does not know.
    artifact.verify(folder, manifest, but=[card.NAME])
    return manifest


def quizzes(opened: Source, files: Sequence[Path]) -> list[Quiz]:
    if not files:
        return []
    tokenizer = tokens.load_tokenizer(opened.folder)
    config = opened.config.get_text_config()
    longest = architecture.positions(opened.config)
    found = [choices.read(file, tokenizer, longest) for file in files]
    for quiz in found:
        for question in quiz.questions:
            ids = (*question.asked, *(token for choice in question.choices for token in choice))
            tokens.check_vocabulary(ids, config.vocab_size)
    return found


def sample(
    opened: Source, manifest: Manifest, draw: Draw, order: Order, progress: Progress
) -> Sample | None:
    rows = draw.rows(architecture.positions(opened.config))
    if order.text is not None:
        return held_out.from_text(opened, order.text, rows, progress.say)
    if order.calibration is not None:
        return held_out.from_lines(opened, order.calibration, rows, progress.say)
    if order.choices:
        return None
    calibrated = manifest.recipe.get("seed")
    return held_out.self_written(
        opened, rows, calibrated if isinstance(calibrated, int) else 0, progress.say
    )


def _brief(digests: Sequence[str]) -> str:
    return ", ".join(digest[:12] for digest in digests) or "no adapter"
