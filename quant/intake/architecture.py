"""What a model's config.json promises: a decoder that transformers knows, and its tensors.

Refuses models that are quantized already, and anything but a decoder-only language model, alone or
behind a vision tower.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from quant import artifact, interrupt
from quant.errors import ArtifactError, SourceError
from quant.intake import spelling


@dataclass(frozen=True, slots=True)
class Outline:
    """The tensors of a model by name, a tied head left out: its own names, and those that the hub
    has for them. `vocabulary` names those whose rows are tokens."""

    config: PretrainedConfig
    shapes: dict[str, tuple[int, ...]]
    published: dict[str, tuple[int, ...]]
    embedding: str
    vocabulary: tuple[str, ...]


def config(folder: Path) -> PretrainedConfig:
    """The configuration in `folder`. SourceError says why it cannot be quantized."""
    path = folder / "config.json"
    if not path.is_file():
        raise SourceError(f"{folder} is not a model folder: it has no config.json")
    try:
        if artifact.quantization_config(folder) is not None:
            raise SourceError(f"{path} has a quantization_config: the model is quantized already")
        found = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ArtifactError as fault:
        raise SourceError(str(fault)) from fault
    except (ValueError, KeyError, TypeError, OSError, StrictDataclassError) as fault:
        raise SourceError(f"{path} is not of a known architecture: {_brief(fault)}") from fault
    _check_decoder(path, found)
    return found


def is_tied(config: PretrainedConfig) -> bool:
    """True where the output head is the embedding."""
    return bool(config.tie_word_embeddings)


def sees(config: PretrainedConfig) -> bool:
    """True where the language model stands behind a vision tower."""
    return config.architectures[0] not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def builder(config: PretrainedConfig) -> Any:
    """Whose `from_config` and `from_pretrained` make the model."""
    return AutoModelForImageTextToText if sees(config) else AutoModelForCausalLM


def hollow(config: PretrainedConfig) -> PreTrainedModel:
    """The model as transformers builds it, without memory."""
    with torch.device("meta"):
        made: PreTrainedModel = builder(config).from_config(config)
    return made


def outline(config: PretrainedConfig) -> Outline:
    model = hollow(config)
    names = {id(module): name for name, module in model.named_modules()}
    embedding = f"{names[id(model.get_input_embeddings())]}.weight"
    head = model.get_output_embeddings()
    heads = (f"{names[id(head)]}.weight",) if head is not None else ()
    left_out = heads if is_tied(config) else ()
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = {name: shape for name, shape in state.items() if name not in left_out}
    published = shapes
    if spelling.expert_leaves(model) is not None:
        parts = spelling.published(model, shapes)
        published = {name: part.shape for name, part in parts.items()}
    return Outline(config, shapes, published, embedding, (embedding, *heads))


def _check_decoder(path: Path, config: PretrainedConfig) -> None:
    names = config.architectures or []
    known = {
        *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
        *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values(),
    }
    if config.is_encoder_decoder or not names or names[0] not in known:
        raise SourceError(
            f"{path}: {', '.join(names) or config.model_type} is not a decoder-only language model"
            " that transformers knows"
        )


def _brief(fault: Exception) -> str:
    return " ".join(str(fault).split())[:300]


def interruptible(model: PreTrainedModel) -> None:
    """Lets a forward end before any of its layers where the user wants it to."""
    for layer in (module for module in model.modules() if isinstance(module, nn.Linear)):
        layer.register_forward_pre_hook(_look)


def _look(_layer: nn.Module, _inputs: object) -> None:
    interrupt.check()
