"""Beside a W8A8 artifact the server computes what parent and adapter do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quant import tokens
from quant.intake import source
from quant.lora import export
from quant.proof import replica
from tests import tiny, variants
from tests.e2e.server import Server, serving
from tests.test_export import Heard
from tests.test_pipeline import calibration_file, letters, quantize

pytestmark = [pytest.mark.e2e, pytest.mark.arithmetic]

TEXT = " ".join(letters(seed=5, lines=4))
# 0.011 nats a token were measured for the base, 0.013 and 0.012 for the adapter beside it, and 0.65
# for the base in the adapter's place.
TOLERANCE = 0.05


def test_an_adapter_beside_w8a8_is_the_merged_model(tmp_path: Path) -> None:
    """As it was trained, scaled by the server; and as exported, which it must not scale again."""
    parent = tiny.model_folder(tmp_path / "parent", dtype=torch.float32, hidden=128)
    tiny.plant_outliers(parent)
    lora, _ = variants.trained(tmp_path / "lora", parent, targets="all-linear")
    made = quantize(parent, tmp_path / "w8a8", scheme="w8a8", texts=calibration_file(tmp_path))
    export.run(export.Order(lora, made.folder, tmp_path / "ready"), Heard())
    flags = ("--model-name", "base", "--adapter", f"lora={lora}")
    with serving(
        made.folder, tmp_path, *flags, "--adapter", f"ready={tmp_path / 'ready'}"
    ) as server:
        server.until_ready()
        assert missed(server, "base", parent) < TOLERANCE
        assert missed(server, "lora", parent, lora) < TOLERANCE
        assert missed(server, "ready", parent, lora) < TOLERANCE
        assert (
            missed(server, "base", parent, lora) > 4 * TOLERANCE
        )  # the adapter changes the answer


def missed(server: Server, model: str, parent: Path, *adapters: Path) -> float:
    """By how many nats a token's served log-probability is off the parent's with them merged."""
    served = torch.tensor(server.log_probabilities(model, TEXT))
    opened = source.open(str(parent), adapters=adapters)
    ids = torch.tensor(tokens.of_text(TEXT, tokens.load_tokenizer(parent)))
    with torch.inference_mode():
        logits = replica.of_parent(opened, torch.device("cpu"))(input_ids=ids[None]).logits[0, :-1]
    meant = logits.log_softmax(dim=-1).gather(1, ids[1:, None])[:, 0]
    return float((served - meant).abs().mean())
