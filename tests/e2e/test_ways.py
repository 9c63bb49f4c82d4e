"""`adapter compare --latency`: a real server of the way, asked for the text that is measured."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
import torch
from typer.testing import CliRunner

from quant.cli import app
from quant.proof.ways import Way
from tests import tiny, variants
from tests.test_pipeline import calibration_file, letters, quantize

pytestmark = pytest.mark.e2e


def test_a_way_is_timed_in_a_server_of_its_own(tmp_path: Path) -> None:
    """An adapter that only its export can serve: the server gets that, and leaves with it."""
    parent = tiny.model_folder(tmp_path / "parent", dtype=torch.float32, hidden=128)
    lora, _ = variants.trained(tmp_path / "lora", parent, init_lora_weights="pissa", r=12)
    made = quantize(parent, tmp_path / "w4a16", texts=calibration_file(tmp_path), samples=8)
    (tmp_path / "book.txt").write_text("\n".join(letters(seed=5)))
    before = servers()
    words = ["adapter", "compare", lora, "--parent", parent, "--base", made.folder, "--latency",
             "--text", tmp_path / "book.txt", "--windows", 3, "--length", 48,
             "--plot", tmp_path / "ways.png", "--json"]  # fmt: skip
    ran = CliRunner().invoke(app, [str(word) for word in words])
    assert ran.exit_code == 0, ran.output
    [way] = json.loads(ran.stdout.splitlines()[-1])["ways"]
    found = Way.model_validate(way).latency
    assert found is not None and (found.requests, found.prompt_tokens) == (3, 24)
    assert found.answer_tokens == 24
    assert found.first_token_ms > 0 and found.next_token_ms > 0 and found.tokens_per_s > 0
    assert (tmp_path / "ways.png").stat().st_size > 10_000
    assert servers() <= before


def servers() -> set[int]:
    """Processes below this one that serve: other tests' too."""
    below = psutil.Process().children(recursive=True)
    return {child.pid for child in below if "serve" in child.cmdline()}
