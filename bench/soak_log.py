"""What clients saw of a server that was hurt once a minute, and whether the claims hold."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field

LIVEZ_LIMIT_S = 1.0
# Once the API process itself is killed or stopped, nobody is left who could end its answers.
CUT_FOR_S = 20.0
PARENT_GROWTH_MIB = 24.0
TREE_GROWTH = 1.25  # a worker that has just started holds fewer caches than one that has served
MORE_DESCRIPTORS = 8

ANSWER, REFUSAL, ERROR_EVENT, CLIENT_ERROR = "answer", "retryable refusal", "error event", "4xx"
LEFT, CUT, WRONG, UNANSWERED = "left by its client", "cut", "wrong answer", "unanswered"
FINE = (ANSWER, REFUSAL, ERROR_EVENT, CLIENT_ERROR, LEFT)


@dataclass(frozen=True, slots=True)
class Ended:
    """One request: of which kind, and how it ended. Times are monotonic seconds."""

    kind: str
    end: str
    began: float
    ended: float
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Struck:
    """One fault; `kills_api` where the process that holds the connections was its victim."""

    fault: str
    began: float
    back_s: float | None  # from the fault to the next 200 of /readyz; None: not until the end
    kills_api: bool = False
    note: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """Resident MiB and open descriptors, of the parent and of the whole process tree."""

    at: float
    parent_mib: float
    tree_mib: float
    parent_descriptors: int
    tree_descriptors: int


@dataclass(frozen=True, slots=True)
class Livez:
    """One GET /livez on a connection of its own; `status` 0: no answer."""

    at: float
    seconds: float
    status: int


@dataclass(slots=True)
class Log:
    """Everything that happened."""

    ended: list[Ended] = field(default_factory=list)
    struck: list[Struck] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    livez: list[Livez] = field(default_factory=list)

    def cut_by_a_kill(self, request: Ended) -> bool:
        """Whether it was open when the process that was to answer it was killed or stopped."""
        kills = [each.began for each in self.struck if each.kills_api]
        return request.end == CUT and any(
            request.began <= at + CUT_FOR_S and request.ended >= at for at in kills
        )

    def failures(self) -> list[Ended]:
        """Requests that ended in none of the ways that are promised."""
        return [e for e in self.ended if e.end not in FINE and not self.cut_by_a_kill(e)]


def report(log: Log) -> int:
    """Prints the tables in Markdown; 1 where a claim does not hold."""
    _requests(log)
    _faults(log)
    held = [_claim(*row) for row in _claims(log)]
    for request in log.failures()[:10]:
        print(f"\n{request}")
    start = log.samples[0].at
    for each in (asked for asked in log.livez if asked.status != 200):
        print(f"\n/livez at {each.at - start:.2f} s: {each.status} after {each.seconds:.2f} s")
    return 0 if all(held) else 1


def _requests(log: Log) -> None:
    ends = [end for end in (*FINE, CUT, WRONG, UNANSWERED) if any(e.end == end for e in log.ended)]
    ends += sorted({e.end for e in log.ended} - set(ends))
    counts = Counter((e.kind, e.end) for e in log.ended)
    print(f"\n| requests | {' | '.join(ends)} |\n|{'---|' * (len(ends) + 1)}")
    for kind in sorted({e.kind for e in log.ended}):
        print(f"| {kind} | {' | '.join(str(counts[kind, end]) for end in ends)} |")


def _faults(log: Log) -> None:
    print("\n| fault | at | ready again after | seen |\n|---|---|---|---|")
    start = log.samples[0].at
    for each in log.struck:
        back = "not until the end" if each.back_s is None else f"{each.back_s:.1f} s"
        print(f"| {each.fault} | {each.began - start:.0f} s | {back} | {each.note} |")


def _claims(log: Log) -> list[tuple[str, str, bool]]:
    failures = Counter(e.end for e in log.failures())
    cut = sum(map(log.cut_by_a_kill, log.ended))
    waits = [each.seconds for each in log.livez]
    dead = [each for each in log.livez if each.status != 200]
    first, last = log.samples[0], log.samples[-1]
    grown = last.parent_mib - first.parent_mib
    return [
        ("requests", str(len(log.ended)), True),
        ("unanswered", str(failures[UNANSWERED]), not failures[UNANSWERED]),
        ("wrong answers", str(failures[WRONG]), not failures[WRONG]),
        ("ended otherwise than promised", str(failures.total()), not failures),
        ("cut when the API process itself was killed or stopped", str(cut), True),
        ("/livez: asked; p50, latest; other than 200",
         f"{len(waits)}; {statistics.median(waits) * 1e3:.0f} ms, {max(waits):.2f} s; {len(dead)}",
         max(waits) <= LIVEZ_LIMIT_S and not dead),
        ("faults the server came back from", f"{sum(e.back_s is not None for e in log.struck)} of "
         f"{len(log.struck)}", all(e.back_s is not None for e in log.struck)),
        ("parent: MiB, descriptors, first and last",
         f"{first.parent_mib:.0f} to {last.parent_mib:.0f}, {first.parent_descriptors} to "
         f"{last.parent_descriptors}",
         grown < PARENT_GROWTH_MIB
         and last.parent_descriptors <= first.parent_descriptors + MORE_DESCRIPTORS),
        ("all processes: MiB, descriptors, first and last",
         f"{first.tree_mib:.0f} to {last.tree_mib:.0f}, {first.tree_descriptors} to "
         f"{last.tree_descriptors}",
         last.tree_mib < first.tree_mib * TREE_GROWTH
         and last.tree_descriptors <= first.tree_descriptors + MORE_DESCRIPTORS),
    ]  # fmt: skip


def _claim(name: str, figure: str, held: bool) -> bool:  # noqa: FBT001
    print(f"{'' if held else 'FAILS: '}{name}: {figure}")
    return held
