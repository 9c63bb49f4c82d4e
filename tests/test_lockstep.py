"""`quant.solver.lockstep`: forwards that stop together, one running at a time, none left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from quant.solver import lockstep
from quant.solver.lockstep import lanes


class ForwardFailed(Exception):
    pass


def counting(start: int, stops: int, log: list[str]) -> Tensor:
    """Stops with start, start + 1, ...; ends with the number after the last."""
    for place in range(start, start + stops):
        log.append(f"before {place}")
        lockstep.stop(torch.tensor(place))
    return torch.tensor(start + stops)


def failing() -> Tensor:
    lockstep.stop(torch.tensor(0))
    raise ForwardFailed


def of_lanes() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("lane")]


@pytest.fixture(autouse=True)
def none_outlives_its_test() -> Iterator[None]:
    yield
    assert not of_lanes()


def test_every_lane_stops_before_the_same_place() -> None:
    log: list[str] = []
    with lanes([partial(counting, start, 2, log) for start in (0, 10, 20)]) as started:
        for stop in range(2):
            for lane in started:
                lane.advance()
            assert [int(lane.waiting or 0) for lane in started] == [stop, stop + 10, stop + 20]
        for lane in started:
            lane.advance()
            assert lane.waiting is None
        assert [int(lane.result()) for lane in started] == [2, 12, 22]
    order = ["before 0", "before 10", "before 20", "before 1", "before 11", "before 21"]
    assert log == order


def test_nothing_runs_before_it_is_told_to() -> None:
    log: list[str] = []
    with lanes([partial(counting, 0, 1, log), partial(counting, 10, 1, log)]) as started:
        started[1].advance()
        assert log == ["before 10"]


def test_a_forward_goes_on_with_what_was_set_while_it_waited() -> None:
    chosen: list[Tensor] = []

    def forward() -> Tensor:
        lockstep.stop(torch.tensor(1.0))
        return chosen[0]

    with lanes([forward]) as (lane,):
        lane.advance()
        chosen.append(torch.tensor(5.0))
        lane.advance()
        assert float(lane.result()) == 5


def test_no_forward_records_gradients() -> None:
    weight = torch.ones(2, requires_grad=True)

    def forward() -> Tensor:
        return weight * 2

    with lanes([forward]) as (lane,):
        lane.advance()
        assert not lane.result().requires_grad


def test_what_a_forward_raises_reaches_the_caller() -> None:
    log: list[str] = []
    with (
        pytest.raises(ForwardFailed),
        lanes([partial(counting, 0, 3, log), failing, partial(counting, 0, 3, log)]) as started,
    ):
        for lane in [*started, *started]:
            lane.advance()


def test_a_caller_that_fails_leaves_no_forward_waiting() -> None:
    unwound: list[int] = []

    def forward(number: int) -> Tensor:
        try:
            lockstep.stop(torch.tensor(0))
        finally:
            unwound.append(number)
        raise AssertionError("resumed although abandoned")

    def half_way(step: Callable[[], None]) -> None:
        step()
        raise ForwardFailed

    with (
        pytest.raises(ForwardFailed),
        lanes([partial(forward, 0), partial(forward, 1)]) as started,
    ):
        half_way(started[0].advance)
    assert unwound == [0]  # the other had not begun


def test_a_lane_that_still_waits_has_no_result() -> None:
    with (
        pytest.raises(AssertionError, match="more often than expected"),
        lanes([partial(counting, 0, 1, [])]) as (lane,),
    ):
        lane.advance()
        lane.result()


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_there_are_no_more_threads_than_lanes_and_cores() -> None:
    """Each lane's matrix products had OpenMP workers of their own, which outlived them."""
    cores, before, stopped = torch.get_num_threads(), threads(), []
    numbers = torch.randn(512, 512)

    def forward() -> Tensor:
        for _ in range(2):
            torch.nn.functional.gelu(numbers)
            lockstep.stop(None)
        return torch.nn.functional.gelu(numbers)

    torch.set_num_threads(8)
    try:
        with lanes([forward] * 12) as started:
            for _ in range(3):
                for lane in started:
                    lane.advance()
                stopped.append(threads() - before)
    finally:
        torch.set_num_threads(cores)
    assert max(stopped) <= 12 + 8, stopped


# Ctrl-C strikes between any two lines of `advance`, in the queues' and locks' own Python as well.
_INTERRUPTED = """
import sys, torch
from quant.solver import lockstep

def forward():
    for _ in range(9):
        lockstep.stop(torch.tensor(0))
    return torch.tensor(1)

def interrupting(after):
    left = [after]
    def trace(frame, event, argument):
        left[0] -= event == "line"
        if left[0] < 0:
            raise KeyboardInterrupt
        return trace
    return trace

after, interrupted = 0, True
while interrupted:
    try:
        with lockstep.lanes([forward, forward]) as (lane, other):
            for one in (lane, other, lane):
                one.advance()
            sys.settrace(interrupting(after))
            try:
                other.advance()
            finally:
                sys.settrace(None)
        interrupted = False
    except KeyboardInterrupt:
        after += 1
print(after)
"""


def test_ctrl_c_anywhere_in_a_step_ends_every_lane() -> None:
    command = [sys.executable, "-c", _INTERRUPTED]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 3
