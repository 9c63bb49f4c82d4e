"""Mixtures of experts, random and tiny: what the server computes is what the artifact says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from quant import artifact, tokens
from quant.intake import source
from quant.lora import served
from quant.proof import replica
from tests import tiny
from tests.e2e.server import serving
from tests.lora import write_lora
from tests.test_pipeline import calibration_file, quantize

pytestmark = pytest.mark.e2e

TEXT = "the quick brown fox jumps over the lazy dog and runs through the green forest at night"
# 1e-4 was measured; the kernels round activations to 16-bit block floating point.
TOLERANCE = 0.005
# Rounded inputs tip: noise of 1e-5 in the reference's embedding moves its answers by 0.017.
ROUNDED = 0.03


@pytest.mark.arithmetic
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
        told = torch.tensor(server.log_probabilities("base", TEXT))
    off = (told - expected(parent, made.folder)).abs().max()
    assert off < (ROUNDED if scheme == "w8a8" else TOLERANCE)


@pytest.mark.parametrize("family", tiny.MIXTURES)
def test_a_mixture_in_full_precision_is_served_and_adapted(family: str, tmp_path: Path) -> None:
    """vLLM would give it Triton's experts, for the sake of LoRA, and end at the first request."""
    parent = tiny.model_folder(tmp_path / "parent", family, hidden=128)
    shapes = {name: size for name, size in served.layers(parent).items() if "self_attn" in name}
    lora = write_lora(tmp_path / "lora", shapes, strength=0.1)
    flags = ("--model-name", "base", "--adapter", f"lora={lora}")
    with serving(parent, tmp_path / "served", *flags) as server:
        server.until_ready()
        for name, adapters in {"base": (), "lora": (lora,)}.items():
            told = torch.tensor(server.log_probabilities(name, TEXT))
            assert (told - in_full(parent, *adapters)).abs().max() < TOLERANCE, name
    assert (in_full(parent, lora) - in_full(parent)).abs().max() > 20 * TOLERANCE


def in_full(parent: Path, *adapters: Path) -> torch.Tensor:
    opened = source.open(str(parent), adapters=adapters)
    return of_text(replica.of_parent(opened, torch.device("cpu")), parent)


def expected(parent: Path, folder: Path) -> torch.Tensor:
    opened = source.open(str(parent), cache=parent.parent)
    manifest = artifact.read(folder)
    assert manifest is not None
    return of_text(replica.of_artifact(opened, folder, manifest, torch.device("cpu")), folder)


@torch.inference_mode()
def of_text(model: PreTrainedModel, folder: Path) -> torch.Tensor:
    ids = torch.tensor([tokens.load_tokenizer(folder)(TEXT)["input_ids"]])
    logits = model(input_ids=ids).logits[0, :-1].log_softmax(dim=-1)
    found: torch.Tensor = logits.gather(1, ids[0, 1:, None])[:, 0]
    return found
