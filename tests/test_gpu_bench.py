"""`bench.gpu`: the part that needs no GPU."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import torch

from bench import gpu, memory, products
from quant.solver.preflight import Calibration, Unit
from tests import tiny
from tests.test_memory import SHAPE


def test_the_floor_is_every_blocks_products(tmp_path: Path) -> None:
    tiny.tokenizer(tmp_path / "tokenizer")
    memory.make(tmp_path / "model", SHAPE, tmp_path / "tokenizer")
    units = [Unit(128, 64), Unit(64, 64), Unit(256, 64), Unit(64, 128)]
    block = products.least(units, Calibration(8, 32, 64, torch.bfloat16))
    found = gpu.floor(tmp_path / "model", samples=8, length=32)
    assert astuple(found) == tuple(2 * part for part in astuple(block))
    assert block.solving == sum((unit.rows + unit.columns) * unit.columns**2 for unit in units)
