"""The registry's rows as objects, and what checks them on their way in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import StringConstraints, TypeAdapter

# A folder of the store is named after it.
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True, slots=True)
class Alias:
    """One alias as it should be; `revision` is the registry's when it last changed."""

    alias: str
    stable: Digest
    previous: Digest | None = None
    canary: Digest | None = None
    weight: float = 0.0
    pinned: bool = False
    revision: int = 0

    @property
    def digests(self) -> tuple[str, ...]:
        return (self.stable, self.canary) if self.canary else (self.stable,)


@dataclass(frozen=True, slots=True)
class Record:
    """One immutable version of an alias, and where its bytes were found."""

    alias: str
    digest: Digest
    source: str
    rank: int
    bytes: int
    made_at: float
    made_by: str


@dataclass(frozen=True, slots=True)
class Event:
    """One row of the history: who did what to an alias, and what came of it."""

    alias: str
    action: str
    who: str
    before: str | None = None
    after: str | None = None
    weight: float | None = None
    result: str = "ok"
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class State:
    """What a replica made of a version: serving, loading, retiring or failed, and why."""

    alias: str
    digest: str
    state: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything a replica needs to converge."""

    revision: int
    aliases: Mapping[str, Alias]
    records: Mapping[tuple[str, str], Record]  # by alias and digest


ALIAS, RECORD = TypeAdapter(Alias), TypeAdapter(Record)
