"""Does a worker get on? Judged by what moves, so that nothing slow is taken for dead.

Two things must come round: the event loop of the API, which sends a beat each time, and the engine,
whose steps a beat counts. What does not come round is told apart by its processes:

- a signal has stopped one: nothing will come of it. `Limits.stopped_s`.
- they rest: they wait for one another, or for a disk or a network. `Limits.rest_s`.
- they compute: a long prefill, a long parse. Patience, up to `Limits.step_s` for one step of the
  engine and `Limits.blocked_s` for the API. A hang that spins is found by this limit only: on a
  GPU a kernel that never ends looks like one that takes long.

While a worker loads there are no beats: it hangs when nothing computes and nothing is logged for
`Limits.start_quiet_s`. Time in which this process did not run itself (a paused machine) is
nobody's.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

VMSTAT = Path("/proc/vmstat")
COMPUTES = 0.05  # of one core: what the timers and sockets of a process at rest stay far below
WORKING = (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP, psutil.STATUS_TRACING_STOP)


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds without progress after which something is said to stand still, or to hang."""

    look_every_s: float = 0.5
    stalled_s: float = 3.0
    stopped_s: float = 8.0
    rest_s: float = 30.0
    blocked_s: float = 60.0
    step_s: float = 600.0
    start_quiet_s: float = 300.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """`hung` names what hangs and for how long; `stalled`: the engine serves nobody just now."""

    hung: str = ""
    in_engine: bool = False
    stalled: bool = False


def memory_kills() -> int:
    """How many processes the kernel has killed for want of memory since it booted."""
    with suppress(OSError):
        for line in VMSTAT.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


class Watch:
    """Of one worker, process `pid`, from its start to its end."""

    def __init__(self, pid: int, limits: Limits) -> None:
        self._pid, self._limits = pid, limits
        self._looked = time.monotonic()
        self._cpu: dict[int, float] = {}
        self._start, self._loop, self._engine = _Progress(), _Progress(), _Progress()

    def due(self) -> bool:
        return time.monotonic() - self._looked >= self._limits.look_every_s

    def loading(self, logged: float) -> Verdict:
        """Of a worker that has sent no beat; `logged` is when it last wrote anything."""
        passed, (api, engine) = self._passed(), self._processes()
        self._start.note(logged, passed, moves=api.moves or engine.moves)
        if self._start.rested_s < self._limits.start_quiet_s:
            return Verdict()
        return Verdict(f"nothing was logged or computed for {self._start.rested_s:.0f} s")

    def serving(self, heard: float, steps: int) -> Verdict:
        """Of one whose last beat was heard then and counted so many steps of the engine."""
        passed, (api, engine) = self._passed(), self._processes()
        self._loop.note(heard, passed, moves=api.moves)
        if heard < self._looked - 2 * self._limits.look_every_s:
            return self._blocked(stopped=api.stopped)  # and nothing is known of the engine
        self._engine.note(steps, passed, moves=engine.moves)
        return self._stuck(stopped=engine.stopped)

    def _blocked(self, *, stopped: bool) -> Verdict:
        rested, busy = self._loop.rested_s, self._loop.worked_s
        if rested < self._patience(stopped=stopped) and busy < self._limits.blocked_s:
            return Verdict()
        how = "was stopped by a signal" if stopped else "has not come round"
        return Verdict(f"the API {how} for {rested + busy:.0f} s")

    def _stuck(self, *, stopped: bool) -> Verdict:
        rested, busy = self._engine.rested_s, self._engine.worked_s
        if rested < self._patience(stopped=stopped) and busy < self._limits.step_s:
            return Verdict(stalled=stopped or rested >= self._limits.stalled_s)
        how = "was stopped by a signal" if stopped else "has taken no step"
        return Verdict(f"the engine {how} for {rested + busy:.0f} s", in_engine=True, stalled=True)

    def _patience(self, *, stopped: bool) -> float:
        return self._limits.stopped_s if stopped else self._limits.rest_s

    def _passed(self) -> float:
        """Seconds since the last look, of which this process was there to see."""
        now = time.monotonic()
        passed, self._looked = now - self._looked, now
        return min(passed, 2 * self._limits.look_every_s)

    def _processes(self) -> tuple[_Look, _Look]:
        """The API's process, and those it has started: the engine's, where there are any."""
        api: list[psutil.Process] = []
        others: list[psutil.Process] = []
        with suppress(psutil.Error):
            api = [psutil.Process(self._pid)]
            others = api[0].children(recursive=True)
        looks = [self._look_at(found) for found in (api, others or api)]
        self._cpu = {pid: spent for look in looks for pid, spent in look.cpu.items()}
        return looks[0], looks[1]

    def _look_at(self, processes: Iterable[psutil.Process]) -> _Look:
        states, cpu = [], {}
        for process in processes:
            with suppress(psutil.Error):
                spent = process.cpu_times()
                states.append(process.status())
                cpu[process.pid] = spent.user + spent.system
        grown = sum(spent - self._cpu.get(pid, spent) for pid, spent in cpu.items())
        stopped = psutil.STATUS_STOPPED in states
        moves = grown > COMPUTES * self._limits.look_every_s or any(s in WORKING for s in states)
        return _Look(stopped=stopped, moves=moves and not stopped, cpu=cpu)


@dataclass(frozen=True, slots=True)
class _Look:
    stopped: bool
    moves: bool
    cpu: dict[int, float]  # pid -> seconds spent so far


class _Progress:
    """Seconds since a figure last changed, apart for those in which its processes worked."""

    def __init__(self) -> None:
        self._figure: float | None = None
        self.rested_s = self.worked_s = 0.0

    def note(self, figure: float, passed_s: float, *, moves: bool) -> None:
        if figure != self._figure:
            self._figure, self.rested_s, self.worked_s = figure, 0.0, 0.0
        elif moves:
            self.rested_s, self.worked_s = 0.0, self.worked_s + passed_s
        else:
            self.rested_s += passed_s
