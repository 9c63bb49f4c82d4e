"""Mixtures of experts, random and tiny: what the server computes is what the artifact says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quant import artifact, tokens
from quant.intake import source
from quant.proof import replica
from tests import tiny
from tests.e2e.server import serving
from tests.test_pipeline import calibration_file, quantize

pytestmark = pytest.mark.e2e

TEXT = "the quick brown fox jumps over the lazy dog and runs through the green forest at night"
# 1e-4 was measured; the kernels round activations to 16-bit block floating point.
TOLERANCE = 0.005


@pytest.mark.parametrize(
    ("family", "scheme"), [("mixtral", "w4a16"), ("qwen2_moe", "w4a16"), ("qwen2_moe", "w8a8")]
)
def test_log_probabilities_are_those_of_the_dequantized_experts(
    family: str, scheme: str, tmp_path: Path
) -> None:
    parent = tiny.model_folder(tmp_path / "parent", family, hidden=128)
    asked: dict[str, Any] = {"scheme": scheme, "texts": calibration_file(tmp_path), "samples": 8}
    made = quantize(parent, tmp_path / "artifact", **asked)
    with serving(made.folder, tmp_path / "served", "--model-name", "base") as server:
        server.until_ready()
        served = torch.tensor(server.log_probabilities("base", TEXT))
    assert (served - expected(parent, made.folder)).abs().max() < TOLERANCE


@torch.inference_mode()
def expected(parent: Path, folder: Path) -> torch.Tensor:
    opened = source.open(str(parent), cache=parent.parent)
    manifest = artifact.read(folder)
    assert manifest is not None
    model = replica.of_artifact(opened, folder, manifest, torch.device("cpu"))
    ids = torch.tensor([tokens.load_tokenizer(folder)(TEXT)["input_ids"]])
    logits = model(input_ids=ids).logits[0, :-1].log_softmax(dim=-1)
    found: torch.Tensor = logits.gather(1, ids[0, 1:, None])[:, 0]
    return found
