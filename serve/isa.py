"""Holds this process to the instruction set the operator allows; importing it is what does it.

torch, oneDNN and MKL read their limits from the environment when they start. vLLM asks torch which
of its C++ extensions to load, on import: this module must come first in every process, so it acts
on import and is the first thing the worker and the fork server load.
"""

from __future__ import annotations

import torch

from serve import settings

VLLM_ASKS = ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported")


def _no() -> bool:
    return False


def limit_to_avx2() -> None:
    """Let torch report what it would on an AVX2-only machine."""
    for question in VLLM_ASKS:
        setattr(torch.cpu, question, _no)


if settings.load().max_cpu_isa == "avx2":
    limit_to_avx2()
