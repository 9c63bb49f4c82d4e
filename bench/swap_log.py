"""What happened while adapters were swapped under load, and whether the claims hold."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass, field

import numpy as np

from bench.versions import Answer, Solo

LEAST_THROUGHPUT = 0.95
FLAT_MIB = 16.0  # growth per 1,000 swaps that passes for none, of some 1,300 MiB


@dataclass(frozen=True, slots=True)
class Swap:
    alias: str
    version: str
    sent: float
    answered: float


@dataclass(frozen=True, slots=True)
class Window:
    began: float
    ended: float
    cpu_s: float  # that the server's processes spent in it
    swapping: bool

    def tokens(self, answers: list[Answer]) -> int:
        """How many arrived in it."""
        times = itertools.chain.from_iterable(answer.times for answer in answers)
        return sum(self.began <= at < self.ended for at in times)

    def rate(self, answers: list[Answer]) -> float:
        return self.tokens(answers) / (self.ended - self.began)

    def thrift(self, answers: list[Answer]) -> float:
        """Tokens per second of the processor, of which every PUT takes its part."""
        return self.tokens(answers) / self.cpu_s


@dataclass(slots=True)
class Log:
    """Everything that happened."""

    answers: list[Answer] = field(default_factory=list)  # of the streams
    probes: list[Answer] = field(default_factory=list)
    swaps: list[Swap] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    hurried: Window | None = None
    switched: list[float] = field(default_factory=list)  # seconds, PUT to first token
    unswitched: list[float] = field(default_factory=list)  # the same request without a PUT
    memory: list[tuple[int, float]] = field(default_factory=list)  # (swaps so far, MiB)

    def paced(self) -> list[Swap]:
        """Those of the windows."""
        return [s for s in self.swaps if self.hurried is None or s.sent < self.hurried.began]


def report(log: Log, solo: Solo, every_s: float) -> int:
    """Prints the table; 1 where a claim does not hold. In windows, swaps came every `every_s`."""
    asked = log.answers + log.probes
    failed = [answer for answer in asked if answer.fault]
    mixed = [answer for answer in asked if not answer.fault and not solo.right(answer)]
    late = [answer for answer in asked if _late(answer, log.swaps)]
    for wrong in (failed + mixed + late)[:3]:
        print(f"{wrong}\n  expected {solo.answers.get((wrong.version, wrong.prompt))!r}")
    growth = _growth(log.memory)
    puts = [swap.answered - swap.sent for swap in log.paced()]
    rows = [
        ("requests; failed", f"{len(asked)}; {len(failed)}", not failed),
        ("answers that are no solo answer of their version", f"{len(mixed)}", not mixed),
        ("answers of an older version than the last PUT", f"{len(late)}", not late),
        *_throughput(log, f"{len(puts)} swaps, one every {every_s:g} s"),
        ("PUT, ms (p50 / p99)", _percentiles(puts), True),
        ("from PUT to the new version's first token, ms", _percentiles(log.switched), True),
        ("the same request without a PUT, ms", _percentiles(log.unswitched), True),
        (f"memory per 1,000 swaps, over the last {len(log.swaps) // 2}",
         f"{growth:+.1f} MiB of {log.memory[-1][1]:.0f}", growth < FLAT_MIB),
    ]  # fmt: skip
    for name, figure, held in rows:
        print(f"{name:56} {figure}{'' if held else '   FAILS'}")
    return 0 if all(held for _, _, held in rows) else 1


def _throughput(log: Log, what: str) -> list[tuple[str, str, bool]]:
    """Each swapping window as a ratio to its still neighbour, by the clock and by the processor."""
    pairs = [
        (first, second) if first.swapping else (second, first)
        for first, second in zip(log.windows[::2], log.windows[1::2], strict=True)
    ]
    clock = [a.rate(log.answers) / b.rate(log.answers) for a, b in pairs]
    thrift = [a.thrift(log.answers) / b.thrift(log.answers) for a, b in pairs]
    rows = [
        (f"tokens/s, {what} / none", _spread(clock), statistics.median(clock) >= LEAST_THROUGHPUT),
        ("tokens per CPU second of the server, the same", _spread(thrift), True),
    ]  # fmt: skip
    if (hurried := log.hurried) is not None:
        still = statistics.median(still.thrift(log.answers) for _, still in pairs)
        speed = (len(log.swaps) - len(log.paced())) / (hurried.ended - hurried.began)
        share = f"{hurried.thrift(log.answers) / still:.3f}"
        rows.append((f"the same without a pause, {speed:.1f} swaps a second", share, True))
    return rows


def _late(answer: Answer, swaps: list[Swap]) -> bool:
    """Whether it was sent after a PUT was answered, and given the version before.

    Not where another PUT of the alias was under way by its first token: then either is right.
    """
    mine = [swap for swap in swaps if swap.alias == answer.model]
    before = [swap for swap in mine if swap.answered < answer.sent]
    if (
        answer.fault
        or not before
        or any(swap.sent < answer.times[0] and swap.answered >= answer.sent for swap in mine)
    ):
        return False
    return answer.version != before[-1].version


def _growth(memory: list[tuple[int, float]]) -> float:
    """MiB per 1,000 swaps, of a straight line through the later half."""
    later = [(swaps, size) for swaps, size in memory if 2 * swaps >= memory[-1][0]]
    swaps, sizes = zip(*later, strict=True)
    return float(np.polyfit(swaps, sizes, 1)[0]) * 1000


def _percentiles(seconds: list[float]) -> str:
    low, high = np.percentile(seconds, [50, 99]) * 1e3
    return f"{low:.0f} / {high:.0f}"


def _spread(ratios: list[float]) -> str:
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return f"{middle:.3f} (quartiles {low:.3f} .. {high:.3f}, {len(ratios)} pairs)"
