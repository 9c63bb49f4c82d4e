"""What the server computes with INT4 is what the artifact's own weights say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.e2e import reference
from tests.e2e.reference import TEXT
from tests.e2e.server import Server

pytestmark = [pytest.mark.e2e, pytest.mark.arithmetic]

# The kernels round activations to 16-bit block floating point, 1e-4 of a layer's output: 2e-3 of a
# log-probability was measured after 210 layers. A wrong scale or code shows as 1 and more.
TOLERANCE = 0.02


def test_int4_log_probabilities_are_those_of_the_dequantized_weights(
    w4a16: Path, server: Server
) -> None:
    served = torch.tensor(server.log_probabilities("base", TEXT))
    assert (served - reference.log_probabilities(w4a16)).abs().max() < TOLERANCE
