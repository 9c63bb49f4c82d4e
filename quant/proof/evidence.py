"""What a comparison with the parent found: as the manifest keeps it, and as people read it.

Standard library and pydantic only, as a server reads manifests without torch. Knows nothing of
how the figures are measured; that is `quant.proof.fidelity`.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Estimate(_Frozen):
    """A figure of the whole sample, and the 95% interval of a paired bootstrap around it."""

    value: float
    low: float
    high: float


class TextFidelity(_Frozen):
    """Over the `predictions` of a next token in `windows` windows of one text.

    KL is KL(parent || quantized) in nats; a shift is what quantization added to the probability
    of the token that came; `digest` is of the windows' tokens.
    """

    name: str
    digest: _Digest
    windows: int
    predictions: int
    parent_perplexity: Estimate
    perplexity: Estimate
    perplexity_ratio: Estimate
    mean_kl: Estimate
    p99_kl: Estimate
    top1_agreement: Estimate
    mean_shift: Estimate
    rms_shift: Estimate


class ChoiceFidelity(_Frozen):
    """Over the questions of one file; every figure is a fraction of them, `digest` of its bytes.

    A flip is another choice than the parent's: from the right one, to the right one, or between
    two wrong ones.
    """

    name: str
    digest: _Digest
    questions: int
    parent_accuracy: Estimate
    accuracy: Estimate
    flips: Estimate
    right_to_wrong: Estimate
    wrong_to_right: Estimate


class FirstAnswers(_Frozen):
    """The first token of the answers to `questions` of ours, in float32: how many of them `differ`
    from the parent's, and the mean KL(parent || quantized) there, in nats."""

    questions: int
    differ: int
    mean_kl: float

    def __str__(self) -> str:
        return (
            f"{self.differ} of {self.questions} answers begin otherwise than the parent's"
            f" (mean KL {self.mean_kl:.2g} nats)"
        )


class Fidelity(_Frozen):
    """What is known of an artifact against its parent, both computed in float32."""

    measured: datetime
    text: TextFidelity | None = None
    choices: tuple[ChoiceFidelity, ...] = ()

    def beside(self, earlier: Fidelity | None) -> Fidelity:
        """This, and what `earlier` knows that was not measured again."""
        if earlier is None:
            return self
        again = {found.digest for found in self.choices}
        kept = tuple(found for found in earlier.choices if found.digest not in again)
        return self.model_copy(
            update={"text": self.text or earlier.text, "choices": self.choices + kept}
        )


Row = tuple[str, str, str]  # what it is, the figure, its interval


def text_rows(found: TextFidelity) -> Iterator[Row]:
    yield _row("perplexity of the parent", found.parent_perplexity, ".3f")
    yield _row("perplexity of the artifact", found.perplexity, ".3f")
    yield _row("perplexity, artifact / parent", found.perplexity_ratio, ".4f")
    yield _row("mean KL(parent || artifact), nats", found.mean_kl, ".4g")
    yield _row("99th percentile KL, nats", found.p99_kl, ".4g")
    yield _row("same likeliest token", found.top1_agreement, ".2%")
    yield _row("next token's probability, mean shift", found.mean_shift, "+.3%")
    yield _row("next token's probability, RMS shift", found.rms_shift, ".3%")


def choice_rows(found: ChoiceFidelity) -> Iterator[Row]:
    yield _row("accuracy of the parent", found.parent_accuracy, ".1%")
    yield _row("accuracy of the artifact", found.accuracy, ".1%")
    yield _row("answers that flip", found.flips, ".1%")
    yield _row("right to wrong", found.right_to_wrong, ".1%")
    yield _row("wrong to right", found.wrong_to_right, ".1%")


def text_title(found: TextFidelity) -> str:
    return f"{found.name}: {found.predictions:,} predictions in {found.windows} windows"


def choice_title(found: ChoiceFidelity) -> str:
    return f"{found.name}: {found.questions:,} questions"


def _row(name: str, figure: Estimate, form: str) -> Row:
    return name, f"{figure.value:{form}}", f"{figure.low:{form}} .. {figure.high:{form}}"
