"""A whole model in float32 that computes what a server of it computes, rounding aside.

The parent as transformers opens it, with its adapters merged; or an artifact with its weights
dequantized and, for W8A8, its layers' inputs rounded. The two are read by different code, so that a
fault of ours in reading the parent is a distance between them. Refuses folders that leave a
parameter without a value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from quant import checkpoint, formats
from quant.artifact import Manifest
from quant.errors import CompareError
from quant.intake import architecture, loaded, spelling
from quant.intake.source import Source
from quant.solver import blocks, int8


def of_parent(source: Source, device: torch.device) -> PreTrainedModel:
    """Read by transformers alone, as `intake.loaded` says. SourceError."""
    return loaded.parent(source, device)


def of_artifact(
    source: Source, folder: Path, manifest: Manifest, device: torch.device
) -> PreTrainedModel:
    """The parent's architecture with the weights that `folder` holds."""
    model = of_tensors(source, checkpoint.dequantized(folder), device, str(folder))
    if manifest.scheme == "w8a8":
        full = formats.FULL.bits
        round_inputs(model, (layer.name for layer in manifest.layers if layer.bits != full))
    return model


def of_tensors(
    source: Source, tensors: Iterable[tuple[str, Tensor]], device: torch.device, place: str
) -> PreTrainedModel:
    """The source's architecture with other weights; `place` names them where one is missing."""
    model = blocks.skeleton(source, device).model
    given = {name: tensor.to(device, torch.float32) for name, tensor in tensors}
    own = spelling.own_names(model, given)
    held = {own[name]: tensor for name, tensor in given.items()}
    model.load_state_dict(held, strict=False, assign=True)
    model.tie_weights()
    architecture.interruptible(model)
    if empty := [name for name, weight in model.named_parameters() if weight.is_meta]:
        raise CompareError(f"{place} lacks {empty[0]}, which {source.architecture} needs to run")
    return model


def beside(model: PreTrainedModel, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Adds B A x to these layers' outputs, as an engine does: x as it was before any rounding.

    `factors` are A [rank, in] and B [out, rank] by module, in the units of the model's layers.
    """
    for name, (a, b) in factors.items():
        layer = model.get_submodule(name)
        model.set_submodule(name, _Adapted(layer, a.to(model.device), b.to(model.device)))


class _Adapted(nn.Module):
    """A layer and what an adapter adds to it."""

    def __init__(self, layer: nn.Module, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.layer, self.a, self.b = layer, a, b

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.layer(inputs)
        return out + functional.linear(functional.linear(inputs, self.a), self.b)


def round_inputs(model: PreTrainedModel, layers: Iterable[str]) -> None:
    """Lets these layers, by their names in a checkpoint, read what an int8 server's do."""
    for name in spelling.own_names(model, (f"{layer}.weight" for layer in layers)).values():
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(_rounded)


def _rounded(_layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (int8.as_served(inputs[0]),)
