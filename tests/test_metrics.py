"""Counts outlive an alias in the sums, and a series of an alias that is gone does not come back."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Counter

from serve.metrics import OUTCOMES, Metrics, outcome_of


def series(family: Counter) -> dict[tuple[str, ...], float]:
    (found,) = family.collect()
    return {
        tuple(s.labels.values()): s.value
        for s in found.samples
        if s.name.endswith("_total") and s.value
    }


@pytest.fixture
def metrics() -> Metrics:
    made = Metrics(CollectorRegistry())
    made.served = {"base", "legal"}.__contains__
    return made


def test_what_a_removed_alias_had_is_added_to_gone(metrics: Metrics) -> None:
    for alias in ("base", "legal", "other"):  # `other` was removed before
        metrics.count_tokens(alias, 5, 7)
        metrics.requests.labels(metrics.label(alias), "ok").inc()
    metrics.errors.labels("legal", "not_found").inc(3)
    assert series(metrics.generation_tokens) == {("base",): 7, ("gone",): 7, ("legal",): 7}
    metrics.served = {"base"}.__contains__
    metrics.forget("legal")
    metrics.count_tokens("legal", 1, 1)
    assert series(metrics.prompt_tokens) == {("base",): 5, ("gone",): 11}
    assert series(metrics.generation_tokens) == {("base",): 7, ("gone",): 15}
    assert series(metrics.requests) == {("base", "ok"): 1, ("gone", "ok"): 2}
    assert series(metrics.errors) == {("gone", "not_found"): 3}


def test_an_alias_that_comes_back_begins_anew(metrics: Metrics) -> None:
    metrics.count_tokens("legal", 1, 1)
    metrics.forget("legal")
    metrics.count_tokens("legal", 2, 2)
    assert series(metrics.prompt_tokens) == {("gone",): 1, ("legal",): 2}


def test_every_outcome_is_there_from_the_start_for_whoever_is_always_there(
    metrics: Metrics,
) -> None:
    metrics.open_books("base")
    (found,) = metrics.requests.collect()
    assert {(s.labels["alias"], s.labels["outcome"]) for s in found.samples} == {
        (alias, outcome) for alias in ("base", "none") for outcome in OUTCOMES
    }


@pytest.mark.parametrize(
    ("status", "outcome"),
    [(200, "ok"), (204, "ok"), (304, "ok"), (400, "client_error"), (401, "client_error"),
     (404, "client_error"), (413, "client_error"), (429, "refused"), (500, "server_error"),
     (501, "server_error"), (502, "server_error"), (503, "refused"), (507, "server_error")],
)  # fmt: skip
def test_each_status_has_one_outcome(status: int, outcome: str) -> None:
    assert outcome_of(status) == outcome and outcome in OUTCOMES


def test_a_503_of_an_engine_that_ended_is_no_refusal() -> None:
    assert outcome_of(503, refuses=False) == "server_error"
