"""What a starting point took out of the base before training: s B0 A0, as two factors.

PiSSA (arXiv 2404.02948) and OLoRA (2406.01775) follow from the base weight alone; any other start,
and PiSSA's random solver, needs the initial adapter that its trainer saved. LoftQ (2310.08659)
leaves a base that no pair gives back: only the base it saved will do.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from quant.errors import AdapterError
from quant.lora.adapter import CONFIG, WEIGHTS, Adapter, read_trained

FROM_BASE = ("pissa", "olora")


def why_not(adapter: Adapter, *, has_base: bool) -> str | None:
    """Why the start of this adapter cannot be undone; None where it can, or there is none."""
    start = adapter.config.start
    if start is None or (has_base and start in FROM_BASE):
        return None
    if start == "loftq":
        return "LoftQ trained on a quantized base that no pair of factors gives back"
    if adapter.initial is None:
        needed = "the base in full precision or " if start in FROM_BASE else ""
        return f"undoing its start {start!r} needs {needed}the initial adapter, which is not there"
    return None


def check(adapter: Adapter) -> None:
    """AdapterError where the start cannot be undone on a full-precision base."""
    if (reason := why_not(adapter, has_base=True)) is not None:
        raise AdapterError(
            f"adapter {adapter.folder}: {reason}; `quantserve adapter merge --training-base"
            " residual` merges it into the base that training left",
            field="init_lora_weights",
            expected="true",
            found=str(adapter.config.start),
        )


def begun(adapter: Adapter) -> Adapter | None:
    """The saved start that is undone; None where none is. AdapterError where it is another's."""
    if adapter.config.start is None or adapter.initial is None:
        return None
    first = _first(adapter.initial)
    for module in adapter.pairs:
        _check_alike(first, adapter, module)
    return first


def identity(adapter: Adapter) -> str | None:
    """The digest of the saved start that is undone; None where none is."""
    first = begun(adapter)
    return None if first is None else first.digest


def factors(adapter: Adapter, module: str, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """A0 [rank, in] and B0 [out, rank] in float32 of one module; `weight` is float32 [out, in].

    AdapterError where they are neither saved beside the adapter nor follow from `weight`.
    """
    reason = why_not(adapter, has_base=weight is not None)
    if reason is not None:
        raise AdapterError(f"adapter {adapter.folder}: {reason}", field="init_lora_weights")
    if adapter.initial is not None:
        return _saved(adapter, module)
    assert weight is not None
    pair = adapter.pairs[module]
    return _of_base(str(adapter.config.start), weight, pair.rank, pair.scale)


def _saved(adapter: Adapter, module: str) -> tuple[Tensor, Tensor]:
    assert adapter.initial is not None
    first = _first(adapter.initial)
    _check_alike(first, adapter, module)
    pair = first.pairs[adapter.pairs[module].module]
    with safe_open(first.weights, framework="pt") as file:
        return file.get_tensor(pair.a_key).float(), file.get_tensor(pair.b_key).float()


def _first(folder: Path) -> Adapter:
    """The adapter in a folder, read and hashed once for as long as its files stay as they are."""
    stats = ((folder / name).stat() for name in (CONFIG, WEIGHTS) if (folder / name).is_file())
    return _read(folder, tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats))


@lru_cache(maxsize=8)
def _read(folder: Path, _state: tuple[tuple[int, ...], ...]) -> Adapter:
    return read_trained(folder)


def _check_alike(first: Adapter, adapter: Adapter, module: str) -> None:
    ours = adapter.pairs[module]
    theirs = first.pairs.get(ours.module)
    if theirs is None or theirs[2:6] != ours[2:6]:
        raise AdapterError(
            f"{first.folder} is not what {adapter.folder} started from: {module} differs",
            field=module,
        )
    if not math.isclose(theirs.scale, ours.scale):
        raise AdapterError(
            f"{first.folder} scales {module} by {theirs.scale:g}, and"
            f" {adapter.folder} by {ours.scale:g}",
            field="lora_alpha",
        )


def _of_base(start: str, weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    if start == "olora":
        left, right = torch.linalg.qr(weight)
        return right[:rank].contiguous(), left[:, :rank].contiguous()
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = (values[:rank] / scale).sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root
