"""`intake.attention`: no argument of a layer is lost on the way to what computes its scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from quant.intake import attention, loaded, source
from quant.intake.source import Source
from quant.proof import replica
from quant.solver import blocks
from tests import families, tiny

CPU = torch.device("cpu")
CAPPED = {"attn_logit_softcapping": 2.0}  # that a tiny model's scores go beyond


def opened(folder: Path, family: str, **config: Any) -> Source:
    path = families.folder(folder, family) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return source.open(str(folder), cache=folder.parent / "cache")


def meant(read: Source, ids: Tensor, kind: str) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(
        read.folder, dtype=torch.float32, attn_implementation=kind
    )
    with torch.no_grad():
        return torch.log_softmax(model(ids).logits, dim=-1)


@pytest.mark.parametrize("family", ["gemma2", "vaultgemma", "llama"])
def test_every_way_to_open_a_model_computes_what_its_own_code_does(
    tmp_path: Path, family: str
) -> None:
    capped = family != "llama"
    read = opened(tmp_path / "model", family, **(CAPPED if capped else {}))
    ids = torch.randint(tiny.VOCAB, (2, 48))
    own, fast = meant(read, ids, "eager"), meant(read, ids, "sdpa")
    assert (float((own - fast).abs().max()) > 1e-2) == capped  # else nothing is seen here
    tensors = ((name, read.tensors.get(name)) for name in read.tensors.names())
    for model in (
        loaded.parent(read, CPU),
        replica.of_tensors(read, tensors, CPU, str(read.folder)),
    ):
        with torch.no_grad():
            found = torch.log_softmax(model(ids).logits, dim=-1)
        torch.testing.assert_close(found, own, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "config", "kind"),
    [
        ("llama", {}, "sdpa"),
        ("gemma3_text", {}, "sdpa"),
        ("gemma2", CAPPED, "eager"),
        ("gemma2", {"attn_logit_softcapping": None}, "sdpa"),
    ],
    ids=["no cap", "a cap of the family that it never hands over", "a cap", "a cap of none"],
)
def test_the_slow_way_is_taken_where_something_would_be_lost(
    tmp_path: Path, family: str, config: dict[str, Any], kind: str
) -> None:
    read = opened(tmp_path / "model", family, **config)
    for model in (blocks.hollow(read, CPU), loaded.parent(read, CPU)):
        assert attention.is_eager(model) == (kind == "eager")
