"""Every scheme loads and answers on AVX2, with an adapter beside the base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from quant.intake import source
from tests.e2e.server import serving

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
def test_eight_bit_schemes_answer_with_paris_and_carry_adapters(
    scheme: str, artifacts: Callable[[str], Path], loras: list[Path], tmp_path: Path
) -> None:
    folder = artifacts(scheme)
    flags = ("--model-name", "base", "--adapter", f"first={loras[0]}")
    with serving(folder, tmp_path, *flags) as server:
        server.until_ready()
        base = server.answer("base")
        assert "Paris" in base
        assert server.answer("first") != base
        assert server.answer("base") == base


def test_a_full_precision_folder_is_served_as_it_is(tmp_path: Path) -> None:
    folder = source.open(source.DEMO).folder
    with serving(folder, tmp_path, "--model-name", "base", "--max-adapters", "0") as server:
        server.until_ready()
        assert "Paris" in server.answer("base")


def test_the_machines_own_instructions_answer_with_paris(w4a16: Path, tmp_path: Path) -> None:
    with serving(w4a16, tmp_path, "--model-name", "base", isa="auto") as server:
        server.until_ready()
        assert "Paris" in server.answer("base")
