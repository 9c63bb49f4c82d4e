"""Where a run computes: devices by their names, and in what precision. Refuses what is not here."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from importlib.util import find_spec

import torch

from quant import room
from quant.errors import RecipeError
from quant.solver.preflight import ON_CPU, Allowed

# oneDNN's names for levels below the first that multiplies it.
_WITHOUT_BFLOAT16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE",
                     "AVX512_CORE_VNNI")  # fmt: skip


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


def idle(used: Sequence[torch.device]) -> str | None:
    """The name of a GPU that is here, where only CPUs are used."""
    if used[0].type != "cpu" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name()


def left(device: torch.device) -> int:
    """Bytes that may still be taken on the device; for the CPU as `room.of_host`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return room.of_host()


def allowance(used: Collection[torch.device]) -> Allowed:
    """Of each GPU three quarters of what is free on the fullest, the rest for holes in its heap; of
    their host half."""
    if any(device.type == "cpu" for device in used):
        return ON_CPU
    return Allowed(min(map(left, used)) * 3 // 4, room.of_host() // 2)


def forward_dtype(device: torch.device, *, exact: bool) -> torch.dtype:
    """What blocks compute in: 16 bits where a device is made for them, unless the run is to be
    `exact`; what is solved is float32 everywhere."""
    made_for = device.type != "cpu" or _multiplies_bfloat16()
    return torch.bfloat16 if made_for and not exact else torch.float32


def _multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for it, and torch and oneDNN may use them."""
    has = torch.cpu.get_capabilities()
    allowed = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    # torch does not tell to what oneDNN was limited.
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    allowed &= limit not in _WITHOUT_BFLOAT16
    return allowed and bool(has.get("avx512_bf16") or has.get("amx_bf16"))


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
    if found.type == "cuda" and find_spec("triton") is None:
        raise RecipeError(f"device {name!r}: Triton is missing, which its loops are written in:"
                          " pip install triton")  # fmt: skip
    return found
