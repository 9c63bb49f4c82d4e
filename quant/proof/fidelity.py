"""How far a quantized model is from its parent: two models and tokens in, figures out.

Owns the measures and nothing else: no files, no tokenizer, no manifest. Logits exist for one
window at a time, their distributions for a chunk of it. Refuses models that compute no numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quant import interrupt
from quant.errors import CompareError
from quant.proof import bootstrap
from quant.proof.evidence import ChoiceFidelity, Estimate, Fidelity, TextFidelity

_CHUNK = 64  # predictions whose distributions over the vocabulary are held at once, in float64

Step = Callable[[int, int], None]  # windows or questions done, of how many


@dataclass(frozen=True, slots=True)
class Pair:
    """Both models in float32 on one device, evaluating."""

    parent: PreTrainedModel
    quantized: PreTrainedModel


@dataclass(frozen=True, slots=True)
class Sample:
    """A text cut into windows of at least two tokens, each [tokens] int64; `digest` is theirs."""

    name: str
    digest: str
    windows: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """Token ids of a question, of each choice after it, and the place of the right one."""

    asked: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    answer: int


@dataclass(frozen=True, slots=True)
class Quiz:
    """The questions of one file; `digest` is of its bytes."""

    name: str
    digest: str
    questions: tuple[Question, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """Every prediction of every window, [predictions] each.

    `before` and `after` are the nats that the parent and the quantized model needed for the token
    that came; `kl` is KL(parent || quantized) in nats; all three float64.
    """

    window: Tensor  # int64, the window it is in
    before: Tensor
    after: Tensor
    kl: Tensor
    agrees: Tensor  # bool, the same likeliest token


@dataclass(frozen=True, slots=True)
class Picks:
    """The choice each model takes, and the right one, int64 [questions] each."""

    before: Tensor
    after: Tensor
    right: Tensor


def trace(pair: Pair, windows: Sequence[Tensor], step: Step) -> Trace:
    """Runs both models over each window. CompareError where logits are not finite."""
    parts: list[tuple[Tensor, ...]] = []
    for place, window in enumerate(windows):
        interrupt.check()
        found = _compared(pair, window)
        parts.append((torch.full((len(window) - 1,), place), *found))
        step(place + 1, len(windows))
    return Trace(*(torch.cat(column) for column in zip(*parts, strict=True)))


def picks(pair: Pair, questions: Sequence[Question], step: Step) -> Picks:
    """The choice of the highest log-likelihood per token, the first of equals."""
    taken: list[tuple[int, int, int]] = []
    for place, question in enumerate(questions):
        interrupt.check()
        taken.append((_pick(pair.parent, question), _pick(pair.quantized, question),
                      question.answer))  # fmt: skip
        step(place + 1, len(questions))
    return Picks(*torch.tensor(taken).T)


def of_text(found: Trace, sample: Sample, seed: int) -> TextFidelity:
    """The figures of a trace over a sample's windows; `seed` draws the resamples."""
    counts = bootstrap.draws(len(sample.windows), seed)
    shift = (-found.after).exp() - (-found.before).exp()
    agrees, ones = found.agrees.double(), torch.ones_like(found.kl)
    sums = _sums(
        [ones, found.before, found.after, found.kl, agrees, shift, shift.square()],
        found.window,
        len(sample.windows),
    )
    total, *of_all = (counts @ sums).T  # [1 + draws] each
    before, after, kl, agreement, mean_shift, squares = (column / total for column in of_all)
    p99 = bootstrap.percentile(found.kl, found.window, counts, 0.99)
    return TextFidelity(
        name=sample.name,
        digest=sample.digest,
        windows=len(sample.windows),
        predictions=len(found.kl),
        parent_perplexity=bootstrap.estimate(before.exp()),
        perplexity=bootstrap.estimate(after.exp()),
        perplexity_ratio=bootstrap.estimate((after - before).exp()),
        mean_kl=bootstrap.estimate(kl),
        p99_kl=bootstrap.estimate(p99),
        top1_agreement=bootstrap.estimate(agreement),
        mean_shift=bootstrap.estimate(mean_shift),
        rms_shift=bootstrap.estimate(squares.sqrt()),
    )


def of_choices(found: Picks, quiz: Quiz, seed: int) -> ChoiceFidelity:
    """The figures of a quiz; `seed` draws the resamples."""
    counts = bootstrap.draws(len(quiz.questions), seed)

    def share(where: Tensor) -> Estimate:
        return bootstrap.estimate(counts @ where.double() / len(quiz.questions))

    was, is_now = found.before == found.right, found.after == found.right
    return ChoiceFidelity(
        name=quiz.name,
        digest=quiz.digest,
        questions=len(quiz.questions),
        parent_accuracy=share(was),
        accuracy=share(is_now),
        flips=share(found.before != found.after),
        right_to_wrong=share(was & ~is_now),
        wrong_to_right=share(~was & is_now),
    )


def now(text: TextFidelity | None, choices: Sequence[ChoiceFidelity] = ()) -> Fidelity:
    return Fidelity(measured=datetime.now(UTC), text=text, choices=tuple(choices))


@torch.inference_mode()
def _compared(pair: Pair, window: Tensor) -> tuple[Tensor, ...]:
    """`before`, `after`, `kl` and `agrees` of a trace for one window, [tokens - 1] each."""
    assert len(window) >= 2, "a window of one token predicts nothing"
    reference = _logits(pair.parent, window, "the parent")  # [tokens - 1, vocabulary]
    logits = _logits(pair.quantized, window, "the artifact")
    chunks = zip(
        *(torch.split(whole, _CHUNK) for whole in (reference, logits, window[1:])), strict=True
    )
    parts: list[tuple[Tensor, ...]] = []
    for one, other, target in chunks:
        expected, computed = one.double().log_softmax(-1), other.double().log_softmax(-1)
        actual = target.to(expected.device)[:, None]
        # Rounding may leave a distance of equals a hair below zero.
        kl = (expected.exp() * (expected - computed)).sum(-1).clamp_min(0)
        parts.append((-expected.gather(1, actual)[:, 0], -computed.gather(1, actual)[:, 0], kl,
                      one.argmax(-1) == other.argmax(-1)))  # fmt: skip
    return tuple(torch.cat(column).cpu() for column in zip(*parts, strict=True))


@torch.inference_mode()
def _pick(model: PreTrainedModel, question: Question) -> int:
    scores = []
    for choice in question.choices:
        ids = torch.tensor([*question.asked, *choice])
        logits = _logits(model, ids, "the model")[-len(choice) :]
        chances = logits.double().log_softmax(-1).cpu()
        scores.append(float(chances.gather(1, torch.tensor(choice)[:, None]).mean()))
    return scores.index(max(scores))


def _logits(model: PreTrainedModel, window: Tensor, name: str) -> Tensor:
    """What predicts every token of [tokens] but the first, [tokens - 1, vocabulary]."""
    ids = window[None, :-1].to(model.device)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    if not bool(logits.isfinite().all()):
        raise CompareError(f"{name} computes logits that are not finite; it cannot be compared")
    return logits


def _sums(columns: Sequence[Tensor], unit: Tensor, units: int) -> Tensor:
    """Each column [tokens] summed within each unit, [units, columns]."""
    stacked = torch.stack(list(columns), dim=1)
    return torch.zeros(units, len(columns), dtype=torch.float64).index_add_(0, unit, stacked)
