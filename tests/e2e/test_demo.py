"""The demo's first answer is right wherever its artifact was made: the parent is sure of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.demo import ANSWER, QUESTION
from quant import tokens
from quant.intake import source
from tests.e2e import reference

pytestmark = [pytest.mark.e2e, pytest.mark.arithmetic]

WIDE = 2.0  # nats


def test_no_rounding_of_the_weights_turns_the_demos_answer(w4a16: Path) -> None:
    """An artifact of fewer calibration rows than the demo's, which is further from its parent."""
    parent = source.open(source.DEMO).folder
    said = f"The capital of Japan is {ANSWER}"
    ids = tokens.load_tokenizer(parent)(said)["input_ids"]
    sure = reference.leads(parent, QUESTION, ids)
    assert float(sure.min()) > WIDE, f"the parent wavers itself at {QUESTION}: {sure}"
    moved = (reference.leads(w4a16, QUESTION, ids) - sure).abs()
    assert bool((moved < sure).all()), f"INT4 moves leads of {sure} by {moved}"
