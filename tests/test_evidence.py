"""`quant.proof.evidence`: what is known of an artifact grows, and old manifests stay readable."""

from __future__ import annotations

import json
from datetime import UTC, datetime

from quant.artifact import Manifest
from quant.proof import evidence
from quant.proof.evidence import ChoiceFidelity, Estimate, Fidelity, TextFidelity
from tests.test_artifact import FACTS


def estimate(value: float) -> Estimate:
    return Estimate(value=value, low=value - 0.01, high=value + 0.01)


def text(name: str = "book.txt", kl: float = 0.05) -> TextFidelity:
    return TextFidelity(
        name=name,
        digest="a" * 64,
        windows=32,
        predictions=16352,
        parent_perplexity=estimate(10),
        perplexity=estimate(10.5),
        perplexity_ratio=estimate(1.05),
        mean_kl=estimate(kl),
        p99_kl=estimate(0.5),
        top1_agreement=estimate(0.9),
        mean_shift=estimate(-0.01),
        rms_shift=estimate(0.06),
    )


def quiz(name: str = "exam.jsonl", digest: str = "b") -> ChoiceFidelity:
    return ChoiceFidelity(
        name=name,
        digest=digest * 64,
        questions=1200,
        parent_accuracy=estimate(0.5),
        accuracy=estimate(0.48),
        flips=estimate(0.07),
        right_to_wrong=estimate(0.04),
        wrong_to_right=estimate(0.02),
    )


def fidelity(of_text: TextFidelity | None = None, *quizzes: ChoiceFidelity) -> Fidelity:
    return Fidelity(measured=datetime(2026, 11, 24, tzinfo=UTC), text=of_text, choices=quizzes)


def test_what_is_not_measured_again_stays_known() -> None:
    earlier = fidelity(text(kl=0.2), quiz("old.jsonl", "c"))
    later = fidelity(None, quiz()).beside(earlier)
    assert later.text == earlier.text
    assert [found.name for found in later.choices] == ["exam.jsonl", "old.jsonl"]


def test_what_is_measured_again_replaces_the_old() -> None:
    earlier = fidelity(text(kl=0.2), quiz("before-it-was-renamed.jsonl"))
    later = fidelity(text(kl=0.1), quiz())
    assert later.beside(earlier) == later == later.beside(None)


def test_a_manifest_from_before_has_no_fidelity_and_is_read() -> None:
    old = json.loads(FACTS.model_dump_json())
    del old["fidelity"]
    assert Manifest.model_validate_json(json.dumps(old)) == FACTS
    known = FACTS.model_copy(update={"fidelity": fidelity(text(), quiz())})
    assert Manifest.model_validate_json(known.model_dump_json()) == known


def test_rows_are_figures_with_their_intervals() -> None:
    rows = {name: rest for name, *rest in evidence.text_rows(text())}
    assert rows["mean KL(parent || artifact), nats"] == ["0.05", "0.04 .. 0.06"]
    assert rows["same likeliest token"] == ["90.00%", "89.00% .. 91.00%"]
    assert rows["next token's probability, mean shift"][0] == "-1.000%"
    assert ("answers that flip", "7.0%", "6.0% .. 8.0%") in evidence.choice_rows(quiz())
    assert evidence.text_title(text()) == "book.txt: 16,352 predictions in 32 windows"
    assert evidence.choice_title(quiz()) == "exam.jsonl: 1,200 questions"
