"""Every scheme is served as its own weights say, with an adapter beside the base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quant.intake import source
from tests.e2e import reference
from tests.e2e.reference import TEXT
from tests.e2e.server import Server, serving

pytestmark = pytest.mark.e2e

# Nats a token on the mean. Rounded inputs tip: a hair in one layer is a step of int8 in the next.
LIMITS = {"w8a16": 0.01, "w8a8": 0.1}
ADAPTED = 0.3  # at least, by an adapter that changes every answer
COARSE = 0.1  # of a processor's own arithmetic, be it bfloat16


def distance(server: Server, expected: torch.Tensor, model: str = "base") -> float:
    """By how many nats a token's log-probability is off, on the mean."""
    served = torch.tensor(server.log_probabilities(model, TEXT))
    return float((served - expected).abs().mean())


@pytest.mark.arithmetic
@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
def test_eight_bit_schemes_are_the_dequantized_model_and_carry_adapters(
    scheme: str, artifacts: Callable[[str], Path], loras: list[Path], tmp_path: Path
) -> None:
    folder = artifacts(scheme)
    expected = reference.log_probabilities(folder)
    flags = ("--model-name", "base", "--adapter", f"first={loras[0]}")
    with serving(folder, tmp_path, *flags) as server:
        server.until_ready()
        base = server.answer("base")
        assert distance(server, expected) < LIMITS[scheme]
        assert distance(server, expected, "first") > ADAPTED
        assert server.answer("base").is_as(base)


@pytest.mark.arithmetic
def test_a_full_precision_folder_is_served_as_it_is(tmp_path: Path) -> None:
    folder = source.open(source.DEMO).folder
    with serving(folder, tmp_path, "--model-name", "base", "--max-adapters", "0") as server:
        server.until_ready()
        assert distance(server, reference.log_probabilities(folder)) < LIMITS["w8a16"]


def test_the_machines_own_instructions_serve_the_same_model(w4a16: Path, tmp_path: Path) -> None:
    with serving(w4a16, tmp_path, "--model-name", "base", isa="auto") as server:
        server.until_ready()
        assert distance(server, reference.log_probabilities(w4a16)) < COARSE
