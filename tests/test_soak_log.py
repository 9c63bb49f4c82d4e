"""`bench.soak_log`: a request that ends otherwise than promised fails the run; so does silence."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench import soak_log
from bench.soak_log import Ended, Livez, Log, Sample, Struck, report

FIRST = Sample(0.0, 80.0, 1900.0, 20, 90)
KILL = Struck("kill -9 of the worker", 50.0, 12.0, kills_api=True)
GOOD = Ended("chat", soak_log.ANSWER, 1.0, 2.0)


def log(*ended: Ended, last: Sample = FIRST, livez: Livez | None = None) -> Log:
    waits = [Livez(1.0, 0.002, 200), livez or Livez(2.0, 0.9, 200)]
    return Log([GOOD, *ended], [KILL], [FIRST, last], waits)


@pytest.mark.parametrize("end", [*soak_log.FINE])
def test_every_promised_end_passes(end: str) -> None:
    assert report(log(Ended("chat", end, 3.0, 4.0))) == 0


@pytest.mark.parametrize(
    ("found", "claim"),
    [
        (log(Ended("chat", soak_log.UNANSWERED, 3.0, 93.0)), "unanswered"),
        (log(Ended("chat", soak_log.WRONG, 3.0, 4.0)), "wrong answers"),
        (log(Ended("swap", "500", 3.0, 4.0)), "ended otherwise"),
        (log(Ended("chat", "503 without Retry-After", 3.0, 4.0)), "ended otherwise"),
        (log(Ended("chat", soak_log.CUT, 3.0, 4.0)), "ended otherwise"),
        (log(livez=Livez(3.0, 1.2, 200)), "/livez"),
        (log(livez=Livez(3.0, 0.1, 0)), "/livez"),
        (log(last=replace(FIRST, parent_mib=120.0)), "parent"),
        (log(last=replace(FIRST, tree_descriptors=200)), "all processes"),
        (replace(log(), struck=[replace(KILL, back_s=None)]), "came back"),
    ],
)
def test_a_claim_that_does_not_hold_is_told(
    found: Log, claim: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(found) == 1
    failing = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILS")]
    assert failing and any(claim in line for line in failing)


def test_a_connection_may_be_cut_only_while_its_process_is_being_killed() -> None:
    held, later = Ended("chat", soak_log.CUT, 45.0, 50.1), Ended("chat", soak_log.CUT, 80.0, 81.0)
    assert log(held, later).failures() == [later]
