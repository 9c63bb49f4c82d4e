"""Holds this process to the instruction set the operator allows; importing it is what does it.

torch, oneDNN and MKL read their limits from the environment when they start. vLLM asks torch which
of its C++ extensions to load, on import: this module must come first in every process, so it acts
on import and is the first thing the worker and the fork server load.
"""

from __future__ import annotations

import torch

from serve import settings

_BEYOND_AVX512 = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
# What vLLM asks torch, and a machine of each level has not.
DENIED = {"avx2": ("_is_avx512_supported", *_BEYOND_AVX512), "avx512": _BEYOND_AVX512}


def _no() -> bool:
    return False


def limit(level: str) -> None:
    """Let torch report what it would on a machine of that level; "auto" is this one."""
    for question in DENIED.get(level, ()):
        setattr(torch.cpu, question, _no)


def unlock() -> None:
    """Have Linux let this process and its children use AMX, where it may be used.

    vLLM's attention takes it and does not ask. oneDNN does, for a product that is large enough:
    where a model has none, the first request was an illegal instruction.
    """
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


limit(settings.load().max_cpu_isa)
unlock()
