"""DeepSpeed ZeRO checkpoints, stages 1 to 3: float32 master weights out of flat partitions.

Stages 1 and 2 cut each parameter group, laid out as one padded vector, into one piece per rank.
Stage 3 cuts every parameter by itself into ceil(numel / ranks) per rank, and lays a rank's pieces
one after the other over its flat groups. Refuses tensor-parallel files, missing ranks and mixed
steps. The layout is that of DeepSpeed's `utils/zero_to_fp32.py`, read anew here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.errors import SourceError, brief
from quant.intake import unpickle
from quant.intake.stored import Checkpoint, Stored, Weight, overlap, whole
from quant.intake.unpickle import Inert

LATEST = "latest"
_OPTIM = re.compile(r"^(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")
_MODEL = re.compile(r"^(?:bf16_|fp16_)?(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt$")
_STEP = re.compile(r"^global_step(\d+)$")

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Rank:
    """One rank's optimizer file: its flat float32 groups."""

    path: Path
    stage: int
    partitions: int  # ranks that the optimizer was cut for
    step: float | None
    groups: tuple[Stored, ...]
    paddings: Sequence[Sequence[int]] | None  # elements left free after each parameter of a group


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements [first, last) of a rank's flat group."""

    flat: Stored
    first: int
    last: int


def find(folder: Path) -> Path | None:
    """The step's folder, chosen by `latest`; None where DeepSpeed left nothing."""
    if any(_OPTIM.match(path.name) for path in folder.glob("*_optim_states.pt")):
        return folder
    steps = sorted(path.parent for path in folder.glob("*/*_model_states.pt"))
    if not (folder / LATEST).is_file():
        if len(set(steps)) > 1:
            names = ", ".join(sorted({step.name for step in steps}))
            raise SourceError(f"{folder} holds {names} and no file `{LATEST}`: give one of them")
        return steps[0] if steps else None
    name = (folder / LATEST).read_text("utf-8", "replace").strip()
    if Path(name).name != name or not name:
        raise SourceError(f"{folder / LATEST} names no folder beside it: {name!r:.80}")
    if not (folder / name).is_dir():
        raise SourceError(f"{folder / LATEST} names {name}, which is not there: copy {name} too")
    return folder / name


def read(step: Path) -> Checkpoint:
    """Every parameter, trained ones from the optimizer; SourceError names what is wrong."""
    optimizer = _files(step, _OPTIM, "optim_states")
    ranks = [_rank(path) for path in optimizer]
    _check_ranks(step, ranks)
    stage3 = ranks[0].stage == 3
    models = _files(step, _MODEL, "model_states")
    if stage3 and len(models) != len(ranks):
        raise SourceError(f"{step} holds {len(models)} of {len(ranks)} *_model_states.pt files")
    states = [_state(path) for path in (models if stage3 else models[:1])]
    _check_steps(step, models, states)
    found = {name: whole(tensor) for name, tensor in _kept_whole(states[0], stage3=stage3)}
    found |= _frozen(models, states) if stage3 else {}
    found |= _cut_by_parameter(ranks, states[0]) if stage3 else _cut_by_group(ranks, states[0])
    for name, original in (states[0].get("shared_params") or {}).items():
        if original in found:
            found[name] = found[original]
    return Checkpoint((*optimizer, *models), found)


def _files(step: Path, pattern: re.Pattern[str], kind: str) -> list[Path]:
    """By rank; each of 0 .. n-1 once."""
    found: dict[int, Path] = {}
    for path in sorted(step.glob(f"*_{kind}.pt")):
        match = pattern.match(path.name)
        if match is None:
            raise SourceError(f"{path} is of no layout known here (experts, or a newer DeepSpeed)")
        if int(match[2]):
            raise SourceError(f"{path} is of a tensor-parallel run: merge it with DeepSpeed first")
        rank = int(match[1] or 0)
        if rank in found:
            raise SourceError(f"{path} and {found[rank].name} are both of rank {rank}: remove one")
        found[rank] = path
    if not found:
        raise SourceError(f"{step} has no *_{kind}.pt: copy the files of every rank")
    missing = [rank for rank in range(max(found)) if rank not in found]
    if missing:
        raise SourceError(f"{step} lacks the *_{kind}.pt of rank {missing[0]}: copy it too")
    return [found[rank] for rank in sorted(found)]


def _rank(path: Path) -> Rank:
    content = unpickle.load(path)
    state = content.get("optimizer_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise SourceError(f"{path} is not a ZeRO optimizer file: it has no optimizer_state_dict")
    stage = state.get("zero_stage", 1)  # the bf16 optimizer, which cuts as stage 1, names none
    stage = stage.arguments[0] if isinstance(stage, Inert) and stage.arguments else stage
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    groups = state.get(key)
    if stage not in (1, 2, 3) or not isinstance(groups, list) or not groups:
        raise SourceError(f"{path} is of ZeRO stage {brief(stage)} and has no {key}")
    if not all(isinstance(group, Stored) and len(group.shape) == 1 for group in groups):
        raise SourceError(f"{path}: {key} are not flat tensors")
    if overlap(group.where for group in groups) is not None:
        raise SourceError(f"{path} is corrupt: {key} share numbers")
    counts = state.get("partition_count")
    counts = counts if isinstance(counts, list) else [counts]
    if not counts or not all(isinstance(n, int) and n == counts[0] for n in counts):
        raise SourceError(f"{path}: groups cut for {counts} ranks (experts) cannot be read")
    paddings = state.get("param_alignment_paddings")
    return Rank(path, stage, counts[0], _trained(state), tuple(groups), paddings)


def _trained(state: Any) -> float | None:
    """Steps that the inner optimizer counts, where it does."""
    base = state.get("base_optimizer_state") or state.get("optimizer_state_dict")
    inner = base.get("state") if isinstance(base, dict) else None
    for entry in inner.values() if isinstance(inner, dict) else ():
        step = entry.get("step") if isinstance(entry, dict) else None
        if isinstance(step, Stored) and step.numel == 1:
            return float(step.read())
        if isinstance(step, int | float):
            return float(step)
    return None


def _check_ranks(step: Path, ranks: Sequence[Rank]) -> None:
    first = ranks[0]
    if first.partitions != len(ranks):
        raise SourceError(
            f"{step} holds {len(ranks)} of {first.partitions} *_optim_states.pt files:"
            " copy those of every rank"
        )
    for rank in ranks:
        sizes = [group.numel for group in rank.groups]
        if (rank.stage, rank.partitions, len(sizes)) != (
            first.stage, first.partitions, len(first.groups)
        ) or (rank.stage == 3 and sizes != [group.numel for group in first.groups]):  # fmt: skip
            raise SourceError(f"{rank.path} is of another run than {first.path.name}")
        if rank.step != first.step:
            raise SourceError(
                f"{rank.path} is of step {rank.step:g}, {first.path.name} of {first.step:g}:"
                " copy the files of one step"
                if rank.step is not None and first.step is not None
                else f"{rank.path} is of another step than {first.path.name}"
            )


def _state(path: Path) -> dict[str, Any]:
    state = unpickle.load(path)
    if not isinstance(state, dict) or not isinstance(state.get("param_shapes"), list):
        raise SourceError(f"{path} is not a ZeRO model file: it has no param_shapes")
    return state


def _check_steps(step: Path, models: Sequence[Path], states: Sequence[Mapping[str, Any]]) -> None:
    named = _STEP.match(step.name)
    wanted = int(named[1]) if named else states[0].get("global_steps")
    for path, state in zip(models, states, strict=False):
        if state.get("global_steps", wanted) != wanted:
            raise SourceError(
                f"{path} is of step {state['global_steps']}, expected {wanted}: copy the files of"
                " one step"
            )
        if state["param_shapes"] != states[0]["param_shapes"]:
            raise SourceError(f"{path} is of another model than {models[0].name}")


def _kept_whole(state: Mapping[str, Any], *, stage3: bool) -> Iterator[tuple[str, Stored]]:
    """Buffers; and below stage 3, where every rank has the model whole, what no optimizer holds.

    DeepSpeed's own script loses the frozen parameters of stage 1, which stand only there.
    """
    names = set(state.get("buffer_names") or ())
    for name, tensor in (state.get("module") or {}).items():
        if isinstance(tensor, Stored) and (not stage3 or name in names):
            yield name, tensor


def _frozen(models: Sequence[Path], states: Sequence[Mapping[str, Any]]) -> dict[str, Weight]:
    """Frozen parameters of stage 3 are cut as trained ones are."""
    found = {}
    for name, shape in (states[0].get("frozen_param_shapes") or {}).items():
        pieces = []
        for path, state in zip(models, states, strict=True):
            fragment = (state.get("frozen_param_fragments") or {}).get(name)
            if not isinstance(fragment, Stored):
                raise SourceError(f"{path} lacks its part of {name}")
            pieces.append(Piece(fragment, 0, fragment.numel))
        found[name] = _weight(name, tuple(shape), pieces)
    return found


def _cut_by_group(ranks: Sequence[Rank], state: Mapping[str, Any]) -> dict[str, Weight]:
    """Stages 1 and 2."""
    if len(state["param_shapes"]) != len(ranks[0].groups):
        raise SourceError(f"{ranks[0].path} has {len(ranks[0].groups)} groups, not as its model")
    found: dict[str, Weight] = {}
    for place, shapes in enumerate(state["param_shapes"]):
        flats = [rank.groups[place] for rank in ranks]
        paddings = ranks[0].paddings[place] if ranks[0].paddings else [0] * len(shapes)
        at = 0
        for (name, shape), padding in zip(_shapes(shapes).items(), paddings, strict=True):
            size = math.prod(shape)
            if name in found or padding < 0:
                raise SourceError(f"{ranks[0].path}: {name} is cut twice, or padded by {padding}")
            found[name] = _weight(name, shape, list(_across(flats, at, at + size)))
            at += size + padding
        _check_end(ranks, at, sum(flat.numel for flat in flats), 2 * len(ranks))
    return found


def _cut_by_parameter(ranks: Sequence[Rank], state: Mapping[str, Any]) -> dict[str, Weight]:
    """Stage 3."""
    found: dict[str, Weight] = {}
    at = 0
    for shapes in state["param_shapes"]:
        for name, shape in _shapes(shapes).items():
            if name in found:
                raise SourceError(f"{ranks[0].path}: {name} is cut twice")
            size = -(-math.prod(shape) // len(ranks))
            pieces = [p for rank in ranks for p in _across(rank.groups, at, at + size)]
            found[name] = _weight(name, shape, pieces)
            at += size
    _check_end(ranks, at, sum(group.numel for group in ranks[0].groups), 1)
    return found


def _shapes(group: object) -> Shapes:
    if not isinstance(group, dict):
        raise SourceError("param_shapes of a ZeRO model file is not a table of shapes")
    shapes = {str(name): tuple(map(int, shape)) for name, shape in group.items()}
    for name, shape in shapes.items():
        if min(shape, default=0) < 0:
            raise SourceError(f"{name} of a ZeRO model file has the shape {list(shape)}")
    return shapes


def _across(flats: Sequence[Stored], first: int, last: int) -> Iterator[Piece]:
    """Elements [first, last) of `flats` laid one after the other."""
    begin = 0
    for flat in flats:
        end = begin + flat.numel
        if begin < last and first < end:
            yield Piece(flat, max(first, begin) - begin, min(last, end) - begin)
        begin = end


def _check_end(ranks: Sequence[Rank], used: int, there: int, alignment: int) -> None:
    if math.ceil(used / alignment) != math.ceil(there / alignment):
        raise SourceError(
            f"{ranks[0].path} and its siblings hold {there} elements of a group, their model"
            f" {used}: the files do not belong together"
        )


def _weight(name: str, shape: tuple[int, ...], pieces: Sequence[Piece]) -> Weight:
    if not pieces or sum(piece.last - piece.first for piece in pieces) < math.prod(shape):
        raise SourceError(f"the ZeRO files hold less of {name} than its shape {list(shape)}")
    flat = pieces[0].flat
    return Weight(flat.path, shape, flat.dtype, partial(_gathered, pieces, shape))


def _gathered(pieces: Sequence[Piece], shape: tuple[int, ...]) -> Tensor:
    parts = [piece.flat.part(piece.first, piece.last) for piece in pieces]
    return torch.cat(parts)[: math.prod(shape)].view(shape)  # cuts the padding of stage 3
