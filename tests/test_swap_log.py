"""`bench.swap_log`: a lost, mixed or late answer fails the run, and so do its figures."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench import swap
from bench.swap_log import Log, Swap, Window, report
from bench.versions import Answer, Solo

SOLO = Solo({("", "p"): "b", ("a@1", "p"): "one", ("a@2", "p"): "two"}, ["p"])
RIGHT = Answer("a", "p", sent=6.0, version="a@2", text="two", times=(7.0,))


def log(*answers: Answer, grown: float = 0.0, still_tokens: int = 1) -> Log:
    """A window with a swap at its fifth second, a still one, and a swap after both."""
    times = (*(float(each) for each in range(10)), *(10 + n / 10 for n in range(10 * still_tokens)))
    stream = Answer("base", "p", sent=0.0, version="", text="b", times=times)
    return Log(
        answers=[stream],
        probes=list(answers),
        swaps=[Swap("a", "a@2", 5.0, 5.5), Swap("a", "a@1", 21.0, 21.5)],
        windows=[Window(0, 10, 1, swapping=True), Window(10, 20, 1, swapping=False)],
        hurried=Window(20, 22, 1, swapping=True),
        switched=[0.5],
        unswitched=[0.25],
        memory=[(0, 1300.0), (1, 1300.0), (2, 1300.0 + grown)],
    )


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        (log(RIGHT), ""),
        (log(replace(RIGHT, fault="no [DONE]")), "requests; failed"),
        (log(replace(RIGHT, text="one")), "no solo answer of their version"),
        (log(replace(RIGHT, version="a@1", text="one")), "older version than the last PUT"),
        # Under way when the PUT was answered, or when the next one was: either version is right.
        (log(replace(RIGHT, sent=5.2, version="a@1", text="one")), ""),
        (log(replace(RIGHT, times=(21.2,), version="a@1", text="one")), ""),
        (log(RIGHT, still_tokens=2), "tokens/s"),
        (log(RIGHT, grown=1.0), "memory"),
    ],
)
def test_a_claim_that_does_not_hold_is_told(
    found: Log, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(found, SOLO, 2.0) == bool(fault)
    failing = [line for line in capsys.readouterr().out.splitlines() if line.endswith("FAILS")]
    assert len(failing) == bool(fault) and all(fault in line for line in failing)


def test_the_table_tells_the_windows_swaps_from_those_without_a_pause(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report(log(RIGHT), SOLO, 2.0)
    told = capsys.readouterr().out
    assert "1 swaps, one every 2 s / none" in told and "PUT, ms (p50 / p99)" in told
    assert "without a pause, 0.5 swaps a second" in told


def test_swaps_that_leave_none_to_judge_the_memory_by_are_an_argument_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ["./artifact", "--rounds", "3", "--swaps", "4", "--total"]
    assert swap.arguments([*asked, "37"]).total == 37
    for few in ("12", "36"):
        with pytest.raises(SystemExit) as ended:
            swap.arguments([*asked, few])
        assert ended.value.code == 2
        told = " ".join(capsys.readouterr().err.split())
        assert f"--total {few}" in told and "more than 36" in told
