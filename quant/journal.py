"""How far a run has come, on disk, so that the same command goes on where it ended.

A block counts as done once its tensors, its reports and the activations behind it lie on disk for
good and the journal says so, by one rename. What it does not name is not there. Refuses to go on
with another command's work, and says what differs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from quant import artifact, command, shards
from quant.artifact import CalibrationReport, FileDigest, LayerReport
from quant.calibration import Batches
from quant.command import Facts
from quant.formats import Format, Plan
from quant.shards import Part
from quant.solver import aside
from quant.solver.aside import Shelf
from quant.solver.blocks import Stream
from quant.solver.layers import Layers
from quant.solver.preflight import Places
from quant.staging import Stage

_JOURNAL, _ROWS = "journal.json", "rows.safetensors"
_TOGETHER = 1 << 27  # bytes of tensors outside the blocks in one file, unless one has more
_AT_ONCE = 1.0  # seconds: activations that take longer to write are not kept behind every block,
_WORTH = 10  # but once as many times that was spent on blocks since they were last kept

Say = Callable[[str], None]


class Entry(BaseModel):
    """`parts` are files by name: what is outside the blocks, then the `done` blocks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    facts: dict[str, str]
    calibration: CalibrationReport
    plan: dict[str, Format] = {}
    parts: dict[str, Part] = {}
    done: int = 0
    reports: tuple[LayerReport, ...] = ()
    digests: dict[str, str] = {}
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Unread:
    """A tensor that belongs to no block: its bytes in the checkpoint, and how to come by it."""

    name: str
    bytes: int
    read: Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Assembled:
    """A checkpoint: bytes of its tensors, and its files' digests as far as they are known."""

    bytes: int
    digests: Mapping[str, FileDigest]


class Journal:
    """One run's. `entry` is what the disk says."""

    def __init__(self, stage: Stage, entry: Entry, blocks: int) -> None:
        self.entry, self._stage, self._blocks = entry, stage, blocks
        self._before = entry.seconds
        self._began = self._kept_at = time.monotonic()
        self._keeping = 0.0  # seconds that it took the last time
        self._done, self._parts = entry.done, dict(entry.parts)  # kept or not
        self._outside = 0  # parts that are no block's
        self._home = stage.state  # where parts lie
        self._promise()

    @property
    def seconds(self) -> float:
        """Since the beginning, the runs that were cut short counted in."""
        return self._before + time.monotonic() - self._began

    def rows(self) -> Batches:
        """The calibration rows of all runs."""
        kept = load_file(self._stage.state / _ROWS)
        return Batches(**kept, report=self.entry.calibration)

    def plan(self, measured: Callable[[], Plan]) -> Plan:
        """The format of every layer where that has to be measured, unless a run before did."""
        if not self.entry.plan:
            self._write(plan=dict(measured()))
        return self.entry.plan

    def outside(self, tensors: Sequence[Unread], total: int) -> None:
        """Keeps what belongs to no block, little of it read at a time, unless a run before did.

        The checkpoint's tensors have about `total` bytes: many stay in the files they are kept in.
        """
        if total > shards.JOINED_BYTES:
            self._home = self._stage.folder
        groups = shards.grouped({each.name: each.bytes for each in tensors}, _TOGETHER)
        self._outside = len(groups)
        if self.entry.parts:
            return
        read = {each.name: each.read for each in tensors}
        for group in groups:
            self._keep_part({name: read[name]() for name in group})
        self._write(parts=dict(self._parts))

    def resume(self, layers: Layers, streams: Sequence[Stream]) -> None:
        """Puts layers and streams where they were behind the last block that is done."""
        layers.reports += self.entry.reports
        layers.digests |= self.entry.digests
        if self.entry.done in (0, self._blocks):
            return
        with safe_open(self._stage.state / _activations(self.entry.done), framework="pt") as kept:
            for place, stream in enumerate(streams):
                stream.hidden = kept.get_tensor(f"hidden.{place}").to(stream.mask.device)
                stream.parent = kept.get_tensor(f"parent.{place}").to(stream.mask.device)

    def finished(
        self, tensors: Mapping[str, Tensor], layers: Layers, streams: Sequence[Stream]
    ) -> None:
        """Keeps one more block: its tensors, and what the next one starts from.

        Where a block is solved faster than that is written, only behind some of them; those since
        the last one are done again by a run that goes on.
        """
        self._done, state = self._done + 1, self._stage.state
        self._keep_part(tensors)
        shards.write(state / _units(self._done), layers.units)
        layers.units.clear()
        began = time.monotonic()
        last, spent = self._done == self._blocks, began - self._kept_at
        if self._keeping > _AT_ONCE and spent < _WORTH * self._keeping and not last:
            return
        if not last:
            shards.write(state / _activations(self._done), _States(streams))
        before = self.entry.done
        self._write(
            parts=dict(self._parts),
            done=self._done,
            reports=tuple(layers.reports),
            digests=dict(layers.digests),
        )
        (state / _activations(before)).unlink(missing_ok=True)
        self._kept_at = time.monotonic()
        self._keeping = self._kept_at - began

    def units(self) -> dict[str, Tensor]:
        """What smoothing divides layers' inputs and outputs by, of all blocks."""
        found: dict[str, Tensor] = {}
        for place in range(1, self.entry.done + 1):
            found |= load_file(self._stage.state / _units(place))
        return found

    @contextmanager
    def shelves(self, places: Places) -> Iterator[list[Shelf | None]]:
        """Where each stream waits: None is the device's memory, a shelf the host's or this run's
        disk."""
        hosted = aside.hosted() if places.host else nullcontext()
        with aside.shelf(self._stage.state) as disk, hosted as host:
            yield [None] * places.device + [host] * places.host + [disk] * places.disk

    def assemble(self) -> Assembled:
        """The checkpoint of all parts, in the folder that becomes the target."""
        folder, parts = self._stage.folder, self.entry.parts
        total = sum(part.tensors for part in parts.values())
        if self._home == folder:
            shards.index(folder, parts, total)
            return Assembled(total, {name: part.file for name, part in parts.items()})
        digest = shards.join([self._home / name for name in parts], folder / artifact.SINGLE)
        return Assembled(total, {artifact.SINGLE: digest} if digest else {})

    def _keep_part(self, tensors: Mapping[str, Tensor]) -> None:
        count = self._outside + self._blocks
        name = shards.name(len(self._parts) + 1, count)
        self._parts[name] = shards.part(self._home / name, tensors)

    def _write(self, **news: object) -> None:
        self.entry = self.entry.model_copy(update={**news, "seconds": self.seconds})
        _keep(self._stage.state, self.entry)
        self._promise()

    def _promise(self) -> None:
        done = self.entry.done
        if done:
            where = f"continues at block {done + 1} of {self._blocks}"
            where = where if done < self._blocks else "continues behind the last block"
            self._stage.promise = f"{where} when run again; --fresh starts over"


def opened(
    stage: Stage, facts: Facts, blocks: int, prepare: Callable[[], Batches], say: Say
) -> Journal:
    """The journal that the same command left, else a new one with the rows of `prepare`.

    What another command left is given up only once the rows are there.
    """
    found = _read(stage)
    differs = command.difference(found.facts, facts) if found else None
    if found and not differs:
        stage.take(anew=False)
        if found.done:
            say(f"going on behind block {found.done} of {blocks}, which an earlier run finished")
        return Journal(stage, found, blocks)
    rows = prepare()
    if found:
        say(f"starting afresh: another command left {found.done} of its blocks here ({differs})")
    return begun(stage, facts, blocks, rows)


def begun(stage: Stage, facts: Facts, blocks: int, rows: Batches) -> Journal:
    """A new journal; whatever was in the stage is gone."""
    stage.take(anew=True)
    kept = {"input_ids": rows.input_ids, "mask": rows.mask, "counted": rows.counted}
    shards.write(stage.state / _ROWS, kept)
    entry = Entry(facts=dict(facts), calibration=rows.report)
    _keep(stage.state, entry)
    return Journal(stage, entry, blocks)


class _States(Mapping[str, Tensor]):
    """Of both kinds of every stream, each read when it is asked for."""

    def __init__(self, streams: Sequence[Stream]) -> None:
        self._streams = streams

    def __getitem__(self, name: str) -> Tensor:
        kind, _, place = name.partition(".")
        stream = self._streams[int(place)]
        return stream.hidden if kind == "hidden" else stream.parent

    def __iter__(self) -> Iterator[str]:
        places = range(len(self._streams))
        return iter([f"{kind}.{place}" for kind in ("hidden", "parent") for place in places])

    def __len__(self) -> int:
        return 2 * len(self._streams)


def _read(stage: Stage) -> Entry | None:
    """None where there is nothing to go on from; a folder that is gone was published."""
    path = stage.state / _JOURNAL
    if not path.is_file() or not stage.folder.is_dir():
        return None
    try:
        return Entry.model_validate_json(path.read_bytes())
    except ValidationError:  # another version's
        return None


def _keep(state: Path, entry: Entry) -> None:
    shards.whole(state / _JOURNAL, [entry.model_dump_json().encode()])


def _units(done: int) -> str:
    return f"units-{done:05}.safetensors"


def _activations(done: int) -> str:
    return f"activations-{done:05}.safetensors"
