"""What a run needs in memory, disk and time, told before it starts; refused where it will not fit.

Knows the phases of a run and what each holds; what the solver holds is `solver.preflight`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import psutil
import torch
from torch import nn

from quant import room, scribe, shards, staging
from quant.errors import RoomError
from quant.intake import attention
from quant.intake.source import Source
from quant.recipe import Recipe
from quant.solver import allotment, devices, preflight
from quant.solver.blocks import Decoder, given_beside
from quant.solver.preflight import FLOAT, Calibration

BESIDE = 200 << 20  # bytes that compiled loops, libraries and the allocator come to take
_OF_A_BLOCK = 40  # times a stream's states: what a block's layers read and make, twice
_MAKING = 3  # times what a stream's blocks get beside the states, while that is worked out
_PER_TOKEN = 600  # bytes of a tokenizer, which is held while text is written
_ASKED = 96 * 64  # tokens of the questions that both models are asked in the end, about
_AT_ONCE = 16  # of the questions, whose logits are held in float64, of both models
_FEW = 16  # threads of libraries, beside the lanes and OpenMP's
_MARGIN = 32 << 20  # bytes of disk beside the tensors: tokenizer, configuration, headers


@dataclass(frozen=True, slots=True)
class Phase:
    """One part of a run: bytes it takes beside the program, and how to do without."""

    name: str
    bytes: int
    remedy: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes, seconds, threads, multiply-adds, and how many a second this machine does in float32.

    `memory` is what the phase that needs most takes of `memory_free`, both of the device that
    computes; `disk` is what the folder grows by of `disk_free`.
    """

    memory: int
    memory_free: int
    disk: int
    disk_free: int
    seconds: float
    operations: int
    speed: float
    threads: int

    def __str__(self) -> str:
        return (
            f"needs about {_size(self.memory)} of memory ({_size(self.memory_free)} free),"
            f" {_size(self.disk)} of disk ({_size(self.disk_free)} free) and {_time(self.seconds)}"
            f" at {2 * self.speed / 1e9:.0f} GFLOP/s"
        )

    def facts(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Run:
    """What is known of a run before it starts."""

    recipe: Recipe
    opened: Source
    decoder: Decoder
    bytes_after: int  # of the checkpoint's tensors
    writes_text: bool  # there is no calibration file
    gated: bool

    @cached_property
    def given(self) -> Calibration:
        """At most: a calibration file may hold less."""
        config, decoder = self.opened.config.get_text_config(), self.decoder
        used = {copy.device for copy in decoder.all()}
        on = decoder.dtype, decoder.device.type, devices.allowance(used), len(used)
        rows = Calibration(self.recipe.samples, self.recipe.length, config.hidden_size, *on)
        together = min(rows.per_stream, rows.samples)
        heads = config.num_attention_heads if attention.is_eager(decoder.model) else 0
        beside = given_beside(decoder, self.opened, together, rows.length)
        return replace(rows, beside=beside, heads=heads)

    def units(self) -> preflight.Blocks:
        chosen = self.opened.config.get_text_config().to_dict().get("num_experts_per_tok", 0)
        return preflight.units(self.decoder.shapes(), chosen)


def checked(run: Run, target: Path, there: int, free: int) -> Estimate:
    """The estimate of a run that fits into `free` bytes of memory and on the disk of `target`,
    where `there` bytes of it lie already.

    RoomError names the phase for which the memory does not reach, or says that the threads do not;
    SpaceError the disk.
    """
    blocks = run.units()
    most = max(phases(run, blocks), key=lambda phase: phase.bytes)
    needed, disk = most.bytes + BESIDE, max(_disk(run) - there, 0)
    disk_free = staging.check_space(target.parent, disk)
    if needed > free:
        raise RoomError(
            f"{run.opened.spec}: {most.name} needs {_size(needed)} of memory, and {_size(free)} of"
            f" {run.decoder.device}'s is free; {most.remedy}"
        )
    threads = _threads(run)
    device, work = run.decoder.device, preflight.operations(blocks, run.given, run.recipe.refine)
    work = replace(
        work, forwards=work.forwards + (_written(run) + 2 * _ASKED) * _parameters(run.opened)
    )
    speed = preflight.speed(device)
    forwards = speed if device.type == "cpu" else preflight.speed(device, run.decoder.dtype)
    held = psutil.Process().memory_info().rss if device.type == "cpu" else 0
    return Estimate(
        memory=needed + held,
        memory_free=free + held,
        disk=disk,
        disk_free=disk_free,
        seconds=preflight.seconds(work, speed, run.given, forwards),
        operations=work.total,
        speed=speed,
        threads=threads,
    )


def _threads(run: Run) -> int:
    """That exist at once where there are most. RoomError where so many may not be started."""
    needed, left = run.given.threads + 2 * torch.get_num_threads() + _FEW, room.of_threads()
    if needed > left:
        raise RoomError(
            f"{run.opened.spec}: solving a block needs {needed} threads, and {left} more may be"
            " started here (the container's limit of processes, or the user's: ulimit -u); fewer"
            " --samples need fewer"
        )
    return needed


def phases(run: Run, blocks: preflight.Blocks) -> Iterator[Phase]:
    """All that hold much, one after the other."""
    opened, given = run.opened, run.given
    numel, depth = _parameters(opened), len(blocks)
    if _written(run):  # the files are mapped while they are read
        dtype = scribe.loaded_as(opened, run.decoder.device)
        told = opened.config.get_text_config().to_dict()
        heads = told.get("num_attention_heads") or 1
        shared = (told.get("num_key_value_heads") or heads) / heads  # of keys' and values' width
        cached = int(2 * depth * given.tokens * given.width * shared) * dtype.itemsize
        yield Phase(
            "the model that writes its own calibration text",
            numel * dtype.itemsize + max(cached, opened.bytes) + _PER_TOKEN * told["vocab_size"],
            "give a calibration file",
        )
    outside = _outside(run)
    # The largest is mapped from its file while it is copied; then come the streams that wait in
    # memory, of which one is worked out at a time.
    waiting = given.states * preflight.places(blocks, given).device // given.streams
    streams = waiting + given.given_beside + _MAKING * given.beside
    yield Phase("the embedding", sum(outside) + max(*outside, streams), "it has to be read")
    block = max(sum(unit.weights for unit in block) for block in blocks) * given.dtype.itemsize
    yield Phase("holding a block against the whole model", sum(outside) + block, "it is read whole")
    yield Phase(
        "solving its largest block",
        preflight.memory(blocks, given),
        "fewer --samples or a shorter --length need less",
    )
    yield Phase("asking both models", _asking(run, blocks), "it is read block by block")
    if run.recipe.bits_per_weight is not None:
        yield Phase("measuring formats", _sensitivity(run, depth), "a shorter --length needs less")
    if run.gated:
        needed = 2 * FLOAT * numel + opened.bytes
        remedy = "leave --max-kl out, and compare where there is more"
        yield Phase("measuring the result beside its parent", needed, remedy)


def _outside(run: Run) -> list[int]:
    """Bytes of each tensor outside the blocks, as it is held: embeddings as they are stored."""
    model, tensors = run.decoder.model, run.opened.tensors
    sparse = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    held = ((name in sparse, tensors.headers[stored])
            for name, stored in run.decoder.outside().items() if stored in tensors)  # fmt: skip
    width = run.decoder.dtype.itemsize
    return [h.end - h.begin if as_stored else math.prod(h.shape) * width for as_stored, h in held]


def _written(run: Run) -> int:
    """Tokens of calibration that the model writes first; what an earlier run wrote is kept."""
    if not run.writes_text or scribe.kept_in(run.opened, run.recipe).is_file():
        return 0
    return run.given.tokens


def _asking(run: Run, blocks: preflight.Blocks) -> int:
    """States of both models, and a block of one or the output head, in float32."""
    width, vocabulary = run.given.width, int(run.opened.config.get_text_config().vocab_size)
    block = max(sum(unit.weights for unit in block) for block in blocks)
    logits = 8 * _AT_ONCE * vocabulary * FLOAT
    return 2 * _ASKED * width * FLOAT + max(block * FLOAT, vocabulary * width * FLOAT + logits)


def _sensitivity(run: Run, depth: int) -> int:
    """States before every block, what one's layers read and make, and the head's logits with what
    is drawn from them."""
    samples, length = run.recipe.samples, run.recipe.length
    tokens = allotment.STREAMS * allotment.together(samples, length) * length
    states = tokens * run.given.width * (depth + _OF_A_BLOCK) * run.given.dtype.itemsize
    states += tokens * run.given.beside // (run.given.per_stream * length)
    vocabulary = int(run.opened.config.get_text_config().vocab_size)
    return states + FLOAT * vocabulary * (6 * length + run.given.width)


def _disk(run: Run) -> int:
    """The checkpoint; and beside it what waits and states of two blocks, later the parts of a small
    one until they are joined."""
    joined = run.bytes_after if run.bytes_after <= shards.JOINED_BYTES else 0
    waiting = preflight.on_disk(run.units(), run.given)
    return run.bytes_after + _MARGIN + max(4 * run.given.states + waiting, joined)


def _parameters(opened: Source) -> int:
    return sum(math.prod(header.shape) for header in opened.tensors.headers.values())


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
