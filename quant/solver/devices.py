"""Where a run computes: devices by their names, and in what precision. Refuses what is not here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from quant.errors import RecipeError


def named(names: str) -> list[torch.device]:
    """The devices of a list like "cuda:0,cuda:1"; RecipeError unless this machine has them.

    One that is named twice is used twice.
    """
    found = [_named(name.strip()) for name in names.split(",")]
    if len({device.type for device in found}) > 1:
        raise RecipeError(f"device {names!r}: all of one kind are needed, cpu or cuda")
    return found


def first(names: str) -> torch.device:
    """The one that computes what cannot be split."""
    return named(names)[0]


def forward_dtype(device: torch.device, *, exact: bool) -> torch.dtype:
    """What blocks compute in: 16 bits where a device is made for them, unless the run needs to
    tell small differences; sums are float32 everywhere."""
    return torch.float32 if exact or device.type == "cpu" else torch.bfloat16


@contextmanager
def products(*, rounded: bool) -> Iterator[None]:
    """Float32 products with factors rounded to bfloat16 (TF32 on CUDA) and sums in float32, where
    the hardware has instructions for it, or in float32 throughout."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if rounded else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _named(name: str) -> torch.device:
    try:
        found = torch.device(name)
    except RuntimeError as fault:
        raise RecipeError(f"{name!r} is not a device torch knows") from fault
    if found.type not in ("cpu", "cuda"):
        raise RecipeError(f"device {name!r}: cpu or cuda is needed")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"device {name!r}: this torch sees no CUDA device")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise RecipeError(f"device {name!r}: this machine has {torch.cuda.device_count()}")
    return found
