"""`command`: what makes two commands the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quant import command, recipe
from quant.intake import source
from tests import tiny


def test_a_processor_that_computes_in_other_bits_does_not_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States that were kept in 16 bits are nothing to go on from in 32."""
    opened = source.open(str(tiny.model_folder(tmp_path)))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    made = []
    for has in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: {"avx512_bf16": has})
        made.append(command.facts(recipe.build({}), opened, None, gated=False))
    assert command.difference(*made) == "blocks in was bfloat16, is float32"
    exact = command.facts(recipe.build({"exact": True}), opened, None, gated=False)
    assert command.difference(made[1], exact) == "exact was False, is True"
