"""Every layer that an adapter may change beside a base is served right; any other is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quant import artifact, tokens
from quant.intake import source, spelling
from quant.lora import served
from quant.proof import replica
from tests import tiny
from tests.e2e.server import Server, serving
from tests.lora import write_lora
from tests.test_pipeline import calibration_file, quantize

pytestmark = pytest.mark.e2e

TEXT = "the quick brown fox jumps over the lazy dog and runs through the green forest at night"
# 1.2e-3 was measured for heads, 2e-4 for others; adapters moved a token by 0.2 to 18 nats.
TOLERANCE = 0.005
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")


@pytest.mark.parametrize(
    "family", [pytest.param("llama", marks=pytest.mark.arithmetic), "phi3", "qwen3", *MIXTURES]
)
def test_what_an_adapter_may_change_is_what_the_merged_model_computes(
    family: str, tmp_path: Path
) -> None:
    parent = tiny.model_folder(tmp_path / "parent", family, hidden=128)
    asked: dict[str, Any] = {"scheme": "w8a16", "texts": calibration_file(tmp_path), "samples": 8}
    folder = quantize(parent, tmp_path / "artifact", **asked).folder
    kinds = by_kind(folder)
    assert set(kinds) == {"layers"} | (set(served.targets(folder)) - set(served.LAYERS))
    loras = {
        kind: write_lora(tmp_path / kind, shapes, strength=0.1) for kind, shapes in kinds.items()
    }
    given = [f"--adapter={kind}={lora}" for kind, lora in loras.items()]
    with serving(folder, tmp_path / "served", "--model-name", "base", *given) as server:
        server.until_ready()
        plain = merged(parent, folder)
        for kind, lora in loras.items():
            told = torch.tensor(server.log_probabilities(kind, TEXT))
            assert (told - merged(parent, folder, lora)).abs().max() < TOLERANCE, kind
            assert (told - plain).abs().max() > 20 * TOLERANCE, kind
        if family in MIXTURES:
            refuses(server, write_lora(tmp_path / "experts", of_experts(folder)))


def by_kind(folder: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """What the server says it serves: heads, routers, and all other layers."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for module, shape in served.layers(folder).items():
        leaf = module.rpartition(".")[2]
        found.setdefault(leaf if leaf not in served.LAYERS else "layers", {})[module] = shape
    return found


def of_experts(folder: Path) -> Mapping[str, tuple[int, int]]:
    shapes = artifact.linear_shapes(folder)
    return {module: shape for module, shape in shapes.items() if ".experts." in module}


def refuses(server: Server, lora: Path) -> None:
    with server.http() as api:
        answer = api.put("/admin/adapters/experts", json={"source": str(lora)})
    assert answer.status_code == 422, answer.text
    assert ".experts." in answer.json()["error"]["param"]
    assert "quantserve adapter merge" in answer.json()["error"]["message"]


def test_the_engine_refuses_what_the_operators_own_targets_leave_out(tmp_path: Path) -> None:
    parent = tiny.model_folder(tmp_path / "parent", hidden=128)
    lora = tiny.adapter_folder(tmp_path / "lora", parent, targets=("q_proj", "o_proj"))
    flags = ("--model-name", "base", "--", "--lora-target-modules", "q_proj")
    with serving(parent, tmp_path / "served", *flags) as server:
        server.until_ready()
        with server.http() as api:
            answer = api.put("/admin/adapters/legal", json={"source": str(lora)})
        assert answer.status_code >= 400 and "layers.0.self_attn.o_proj" in answer.text
        assert server.log_probabilities("base", TEXT)


@torch.inference_mode()
def merged(parent: Path, folder: Path, lora: Path | None = None) -> Tensor:
    """Of the artifact's weights, and an adapter's whole change to them."""
    opened = source.open(str(parent), cache=parent.parent)
    manifest = artifact.read(folder)
    assert manifest is not None
    model = replica.of_artifact(opened, folder, manifest, torch.device("cpu"))
    if lora is not None:
        pairs, weights = (
            load_file(lora / "adapter_model.safetensors"),
            dict(model.named_parameters()),
        )
        for key in (key for key in pairs if key.endswith(".lora_A.weight")):
            name = key.removeprefix("base_model.model.").replace(".lora_A", "")
            own = spelling.own_names(model, [name])[name]
            weights[own].add_(pairs[key.replace("lora_A", "lora_B")] @ pairs[key])
    ids = torch.tensor([tokens.load_tokenizer(folder)(TEXT)["input_ids"]])
    logits = model(input_ids=ids).logits[0, :-1].log_softmax(dim=-1)
    found: Tensor = logits.gather(1, ids[0, 1:, None])[:, 0]
    return found
