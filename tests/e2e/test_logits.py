"""What the server computes with INT4 is what the artifact's own weights say."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quant import checkpoint
from quant.intake import source

pytestmark = pytest.mark.e2e

TEXT = (
    "The river rises in the mountains, crosses the plain and reaches the sea near the old harbour. "
    "Its valley has been settled for three thousand years; the bridges are younger."
)
# The kernels round activations to 16-bit block floating point, 1e-4 of a layer's output: 2e-3 of a
# log-probability was measured after 210 layers. A wrong scale or code shows as 1 and more.
TOLERANCE = 0.02


def test_int4_log_probabilities_are_those_of_the_dequantized_weights(
    w4a16: Path, api: httpx.Client
) -> None:
    body = {"model": "base", "prompt": TEXT, "max_tokens": 1, "prompt_logprobs": 0}
    answer = api.post("/v1/completions", json=body)
    assert answer.status_code == httpx.codes.OK, answer.text
    told = answer.json()["choices"][0]["prompt_logprobs"][1:]  # nothing predicts the first token
    served = torch.tensor([next(iter(token.values()))["logprob"] for token in told])
    expected = expected_log_probabilities(w4a16, [int(next(iter(token))) for token in told])
    assert (served - expected).abs().max() < TOLERANCE


def expected_log_probabilities(folder: Path, ids: list[int]) -> torch.Tensor:
    """Of each of the text's tokens after the first, by transformers in float32."""
    parent = source.open(source.DEMO).folder
    model = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32)
    weights = {name: tensor.float() for name, tensor in checkpoint.dequantized(folder)}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}  # tied
    text = AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    assert text[1:] == ids
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([text])).logits[0, :-1]
    found: torch.Tensor = logits.log_softmax(dim=-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
    return found
