"""A worker is judged by what moves: real processes that rest, compute, or were stopped."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from serve.watch import Limits, Verdict, Watch

LIMITS = Limits(look_every_s=0.05, stalled_s=0.1, stopped_s=0.3, rest_s=0.3, blocked_s=0.6,
                step_s=0.6, start_quiet_s=0.3)  # fmt: skip
PATIENT = Limits(look_every_s=0.05, stopped_s=0.2, rest_s=0.2, blocked_s=1e9, step_s=1e9)
WORKER = """
import subprocess, sys, time
engine = subprocess.Popen([sys.executable, "-c", sys.argv[2]], stdin=subprocess.PIPE)
print(flush=True)
exec(sys.argv[1])
"""
RESTS, COMPUTES = "import time; time.sleep(600)", "while True: pass"


class Worker:
    """A process with one child, its engine."""

    def __init__(self, api: str, engine: str) -> None:
        command = [sys.executable, "-c", WORKER, api, engine]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.process.stdout.readline()
        (self.engine,) = psutil.Process(self.process.pid).children()

    def until(self, watch: Watch, *, beats: bool = True, steps: bool = False) -> Verdict:
        """The first verdict of a hang, or the last of many looks."""
        heard, step = time.monotonic(), 0
        for _ in range(40):
            time.sleep(LIMITS.look_every_s)
            heard, step = time.monotonic() if beats else heard, step + steps
            verdict = watch.serving(heard, step)
            if verdict.hung:
                return verdict
        return verdict

    def end(self) -> None:
        for process in (self.engine, psutil.Process(self.process.pid)):
            process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def worker(request: pytest.FixtureRequest) -> Iterator[Worker]:
    made = Worker(*request.param)
    yield made
    made.end()


resting = pytest.mark.parametrize("worker", [(RESTS, RESTS)], indirect=True)


@resting
def test_an_engine_that_comes_round_is_well(worker: Worker) -> None:
    assert worker.until(Watch(worker.process.pid, LIMITS), steps=True) == Verdict()


@resting
def test_an_engine_that_rests_over_its_work_hangs(worker: Worker) -> None:
    verdict = worker.until(Watch(worker.process.pid, LIMITS))
    assert verdict.in_engine and "has taken no step" in verdict.hung


@pytest.mark.parametrize("worker", [(RESTS, COMPUTES)], indirect=True)
def test_an_engine_that_computes_is_waited_for_but_not_for_ever(worker: Worker) -> None:
    assert worker.until(Watch(worker.process.pid, PATIENT)) == Verdict()
    assert worker.until(Watch(worker.process.pid, LIMITS)).in_engine


@pytest.mark.parametrize("worker", [(COMPUTES, COMPUTES)], indirect=True)
def test_a_stopped_engine_hangs_whatever_else_computes(worker: Worker) -> None:
    worker.engine.send_signal(signal.SIGSTOP)
    verdict = worker.until(Watch(worker.process.pid, PATIENT))
    assert "was stopped by a signal" in verdict.hung and verdict.stalled


@resting
def test_a_stop_is_found_sooner_than_a_rest(worker: Worker) -> None:
    limits = Limits(look_every_s=0.05, stopped_s=0.2, rest_s=1e9, blocked_s=1e9)
    assert not worker.until(Watch(worker.process.pid, limits)).hung
    for process in (worker.engine, psutil.Process(worker.process.pid)):
        process.send_signal(signal.SIGSTOP)
    verdict = worker.until(Watch(worker.process.pid, limits), beats=False)
    assert "the API was stopped by a signal" in verdict.hung


@resting
def test_an_api_that_rests_without_a_beat_hangs(worker: Worker) -> None:
    verdict = worker.until(Watch(worker.process.pid, LIMITS), beats=False)
    assert "the API has not come round" in verdict.hung and not verdict.in_engine


@pytest.mark.parametrize("worker", [(COMPUTES, RESTS)], indirect=True)
def test_an_api_that_computes_without_a_beat_is_waited_for(worker: Worker) -> None:
    assert worker.until(Watch(worker.process.pid, PATIENT), beats=False) == Verdict()


@resting
def test_a_start_is_quiet_for_only_so_long(worker: Worker) -> None:
    watch, logged = Watch(worker.process.pid, LIMITS), time.monotonic()
    for _ in range(40):
        time.sleep(LIMITS.look_every_s)
        if verdict := watch.loading(logged).hung:
            break
    assert "nothing was logged or computed" in verdict
    assert watch.loading(time.monotonic()) == Verdict(), "a line in the log is progress"


@resting
def test_time_in_which_nobody_looked_is_nobodys(worker: Worker) -> None:
    watch = Watch(worker.process.pid, LIMITS)
    watch.serving(time.monotonic(), 1)
    time.sleep(2 * LIMITS.rest_s)  # this process was paused
    assert not watch.serving(time.monotonic(), 1).hung


def test_a_process_that_is_gone_is_no_fault_of_the_watch() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert not Watch(ended.pid, LIMITS).serving(time.monotonic(), 1).hung
