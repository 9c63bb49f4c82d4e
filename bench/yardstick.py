"""One yardstick for whoever quantized: `quant.proof.fidelity` on windows of one text, in float32.

And the ledger: a line of JSON for each run, so that a table over many of them needs no rerun.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from transformers import PreTrainedModel

from quant import artifact, calibration
from quant.intake import source
from quant.intake.source import Source
from quant.proof import fidelity, held_out, replica
from quant.proof.evidence import Estimate, TextFidelity
from quant.proof.fidelity import Pair, Sample
from quant.recipe import Recipe

HOST = torch.device("cpu")
PASSAGE = 16  # tokens in a row: no accident
MOST = 65_536  # windows or rows of a file
HEAD = ("run", "time", "peak memory", "checkpoint", "perplexity", "mean KL, nats", "KL / {}",
        "same likeliest token")  # fmt: skip


def parser(doc: str | None, schemes: Sequence[str], cache: str) -> argparse.ArgumentParser:
    """What every table of runs is asked for: the model, the texts, the ledger."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--model", default="demo", help="the full-precision parent, or `demo`")
    add("--scheme", choices=schemes, default="w4a16")
    add("--group-size", type=int, help="inputs that share a scale [the largest that fits]")
    add("--calibration", type=Path, help='JSONL of {"text"} or {"messages"} lines')
    add("--samples", type=int, default=32, help="calibration rows")
    add("--length", type=int, default=512, help="tokens of each, and of each window")
    add("--text", type=Path, help="UTF-8 text to measure on, where it calibrates nothing")
    add("--apart", type=Path, nargs="+", default=[],
        help="and shares no passage with these calibration files either")  # fmt: skip
    add("--windows", type=int, default=32, help="windows of it")
    add("--threads", type=int, default=os.cpu_count() or 1, help="of everybody")
    add("--cache", type=Path, default=Path("~/.cache/quantserve") / cache, help="what is made")
    add("--results", type=Path, help="the ledger [CACHE/results.jsonl]")
    add("--table", action="store_true", help="run nothing, print the ledger")
    return made


def patiently(module: str) -> None:
    """Starts `bench.MODULE` over where OpenMP's workers would spin beside the next batch's, as
    the command's do not: they are told while torch is loaded."""
    if "OMP_WAIT_POLICY" not in os.environ:
        command = [sys.executable, "-m", f"bench.{module}", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | {"OMP_WAIT_POLICY": "passive"})


def arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What was asked for, with absolute paths; an error where there is nothing to measure on."""
    args = parser.parse_args()
    args.cache = args.cache.expanduser().absolute()
    if Path(args.model).exists():
        args.model = str(Path(args.model).absolute())
    args.results = args.results or args.cache / "results.jsonl"
    if not args.table and (args.calibration is None or args.text is None):
        parser.error("--calibration and --text are needed")
    return args


class Row(BaseModel):
    """One run: what was asked of whom, what it took, what it lost or why it failed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    version: str
    model: str
    scheme: str
    group_size: int
    seed: int
    calibration: str  # digest of the tokens
    threads: int
    cpus: str
    isa: str = "auto"
    when: datetime
    seconds: float | None = None
    peak_bytes: int | None = None  # of the process and all below it
    bytes: int | None = None  # of the weight files
    found: TextFidelity | None = None
    failure: str | None = None

    @property
    def setting(self) -> str:
        group = "per channel" if self.group_size < 0 else f"groups of {self.group_size}"
        held = "" if self.isa == "auto" else f", as on {self.isa.upper()}"
        return f"{self.model}, {self.scheme}, {group}, calibration {self.calibration[:8]}{held}"


class Yardstick:
    """A parent and the windows that measure what was made of it."""

    def __init__(self, parent: Source, text: Path, windows: Recipe, *files: Path) -> None:
        """Draws `windows.samples` of the text's windows, none that shares a passage with a line of
        the calibration `files`, whether that line was drawn to calibrate or not."""
        self._source = parent
        whole = windows.model_copy(update={"samples": MOST})
        found = held_out.from_text(parent, text, whole, source.quiet)
        for file in files:
            found = apart(found, calibration.prepare(parent, whole, file, source.quiet).input_ids)
        self._sample = drawn(found, windows.samples, windows.seed)
        self._seed = windows.seed
        self._parent = remembering(replica.of_parent(parent, HOST))

    def weights(
        self, tensors: Iterable[tuple[str, Tensor]], rounded: Iterable[str], place: str
    ) -> TextFidelity:
        """Of a full-precision model's `tensors`; the layers `rounded` read int8 inputs."""
        model = replica.of_tensors(self._source, tensors, HOST, place)
        replica.round_inputs(model, rounded)
        return self._measured(model)

    def artifact(self, folder: Path) -> TextFidelity:
        """Of what `quantserve quantize` wrote."""
        manifest = artifact.read(folder)
        assert manifest is not None, f"{folder} has no manifest"
        return self._measured(replica.of_artifact(self._source, folder, manifest, HOST))

    def _measured(self, model: PreTrainedModel) -> TextFidelity:
        trace = fidelity.trace(Pair(self._parent, model), self._sample.windows, _quiet)
        return fidelity.of_text(trace, self._sample, self._seed)


def apart(sample: Sample, rows: Tensor) -> Sample:
    """The windows that share no passage of `PASSAGE` tokens with any of `rows` [rows, length]."""
    seen = {passage for row in rows for passage in _passages(row)}
    kept = [window for window in sample.windows if seen.isdisjoint(_passages(window))]
    if len(kept) < len(sample.windows):
        left = len(sample.windows) - len(kept)
        say(f"{sample.name}: {left} windows are left out, they overlap with calibration lines")
    return replace(sample, windows=tuple(kept))


def drawn(sample: Sample, count: int, seed: int) -> Sample:
    """`count` windows in their order; SystemExit where there are not as many."""
    if len(sample.windows) < count:
        sys.exit(f"{sample.name}: {count} windows asked for, {len(sample.windows)} can be used")
    order = torch.randperm(len(sample.windows), generator=torch.Generator().manual_seed(seed))
    chosen = [sample.windows[place] for place in sorted(order[:count].tolist())]
    digest = hashlib.sha256(torch.cat(chosen).numpy().tobytes()).hexdigest()
    return Sample(sample.name, digest, tuple(chosen))


def _passages(ids: Tensor) -> Iterator[bytes]:
    return (passage.numpy().tobytes() for passage in ids.unfold(0, PASSAGE, 1))


def remembering(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, running its blocks once for each window; only the head runs every time."""
    seen: dict[bytes, Any] = {}
    inner = model.base_model
    run = inner.forward

    def forward(input_ids: Tensor, **rest: Any) -> Any:
        key = input_ids.numpy().tobytes()
        if key not in seen:
            seen[key] = run(input_ids=input_ids, **rest)
        return seen[key]

    inner.forward = forward
    return model


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def keep(file: Path, row: Row) -> None:
    """Adds a row to the ledger."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as ledger:
        ledger.write(row.model_dump_json() + "\n")


def kept(file: Path) -> list[Row]:
    """The ledger's rows, of runs that were repeated the latest."""
    latest: dict[tuple[str, str], Row] = {}
    for line in file.read_text("utf-8").splitlines():
        row = Row.model_validate_json(line)
        latest[row.setting, row.name] = row
    return list(latest.values())


def tables(rows: Sequence[Row], baseline: str) -> Iterator[str]:
    """A Markdown table for each setting, KL as a multiple of the run named `baseline`'s."""
    for setting in dict.fromkeys(row.setting for row in rows):
        alike = [row for row in rows if row.setting == setting]
        known = {row.name: row.found for row in alike if row.found}
        unit = known[baseline].mean_kl.value if baseline in known else None
        was = next((found.parent_perplexity for found in known.values()), None)
        yield f"\n{setting}" + (f"; the parent's perplexity is {was.value:.3f}" if was else "")
        yield ""
        yield "| " + " | ".join(HEAD).format(baseline) + " |"
        yield "|---" * len(HEAD) + "|"
        for row in alike:
            yield "| " + " | ".join(_cells(row, unit)) + " |"


def _cells(row: Row, unit: float | None) -> Iterator[str]:
    yield f"{row.name} {row.version}".strip()
    if row.failure is not None:
        yield f"failed: {row.failure}"
        yield from [""] * (len(HEAD) - 2)
        return
    yield f"{row.seconds:.0f} s" if row.seconds is not None else ""
    yield f"{row.peak_bytes / 1e9:.2f} GB" if row.peak_bytes is not None else ""
    yield f"{row.bytes / 1e6:.1f} MB" if row.bytes is not None else ""
    assert row.found is not None
    yield f"{row.found.perplexity.value:.3f} ({row.found.perplexity_ratio.value - 1:+.2%})"
    yield _interval(row.found.mean_kl)
    yield f"{row.found.mean_kl.value / unit:.2f}" if unit else ""
    yield f"{row.found.top1_agreement.value:.1%}"


def _interval(figure: Estimate) -> str:
    return f"{figure.value:.4f} ({figure.low:.4f} .. {figure.high:.4f})"


def _quiet(_done: int, _total: int) -> None:
    """Nobody is told."""
