"""What a model's config.json promises: a decoder that transformers knows, and its tensors.

Refuses models that are quantized already, and anything but a decoder-only language model, alone or
behind a vision tower.
"""

from __future__ import annotations

import re
import sys
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
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES as CONFIG_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from quant import interrupt
from quant.errors import SourceError
from quant.intake import config_json, spelling
from quant.intake.spelling import Shape, Spelling

# What building a configuration or a model lets fly over values that no such model has.
_UNBUILDABLE = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError,
    RecursionError, RuntimeError, ImportError, OSError, StrictDataclassError,
)  # fmt: skip
_BUFFERS = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")  # once stored, now computed


@dataclass(frozen=True, slots=True)
class Outline:
    """The tensors that a model is made of, by its own names.

    `shapes` leaves out what is `tied` to another tensor: its name -> the other's. The rows of those
    in `vocabulary` are tokens. `optional` may be missing, and loaders pass over `ignored` names.
    """

    config: PretrainedConfig
    spelling: Spelling
    shapes: dict[str, Shape]
    tied: dict[str, str]
    embedding: str
    head: str | None
    vocabulary: tuple[str, ...]
    optional: frozenset[str]
    ignored: re.Pattern[str]


def config(folder: Path) -> PretrainedConfig:
    """The configuration in `folder`. SourceError says why no model can be built by it."""
    path = folder / config_json.FILE
    raw = config_json.read(folder)
    try:
        found = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        depth = found.get_text_config().num_hidden_layers
    except StrictDataclassError as fault:
        raise SourceError(f"{path} is not valid: {_brief(fault)}") from fault
    except _UNBUILDABLE as fault:
        known = raw.get("model_type") in CONFIG_NAMES
        what = "not valid" if known else "not of a known architecture"
        raise SourceError(f"{path} is {what}: {_brief(fault)}") from fault
    # Kernels that a trainer had: whoever computes has others.
    found._attn_implementation = None  # the documented setting has no other name
    _check_decoder(path, found, raw.get("architectures"))
    if not isinstance(depth, int) or depth < 1:
        raise SourceError(f"{path}: num_hidden_layers is {depth}: expected at least 1")
    return found


def is_tied(config: PretrainedConfig) -> bool:
    """True where the output head is the embedding."""
    return bool(config.tie_word_embeddings)


def sees(config: PretrainedConfig) -> bool:
    """True where the language model stands behind a vision tower."""
    return config.architectures[0] not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def positions(config: PretrainedConfig) -> int:
    """The longest row the model has positions for; no limit where it says none, as with ALiBi."""
    text = config.get_text_config()
    return int(getattr(text, "max_position_embeddings", 0) or sys.maxsize)


def builder(config: PretrainedConfig) -> Any:
    """Whose `from_config` and `from_pretrained` make the model."""
    plain = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForCausalLM if plain else AutoModelForImageTextToText


def hollow(config: PretrainedConfig) -> PreTrainedModel:
    """The model as transformers builds it, without memory. SourceError where it cannot."""
    try:
        with torch.device("meta"):
            made: PreTrainedModel = builder(config).from_config(config)
    except _UNBUILDABLE as fault:
        path = Path(config.name_or_path) / config_json.FILE
        name = type(config).__name__.removesuffix("Config")
        raise SourceError(
            f"{path} describes no {name} that can be built: {_brief(fault)}"
        ) from fault
    return made


def outline(config: PretrainedConfig) -> Outline:
    """SourceError where config.json's numbers make no model."""
    model = hollow(config)
    names = {id(module): name for name, module in model.named_modules()}
    spelled = spelling.of(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = [embedding, *([head] if head is not None else [])]
    vocabulary = [f"{names[id(end)]}.{leaf}" for end in ends for leaf, _ in end.named_parameters()]
    ties = model.all_tied_weights_keys
    tied = {name: of for name, of in ties.items() if {name, of} <= spelled.own.keys()}
    return Outline(
        config=config,
        spelling=spelled,
        shapes={name: shape for name, shape in spelled.own.items() if name not in tied},
        tied=tied,
        embedding=f"{names[id(embedding)]}.weight",
        head=f"{names[id(head)]}.weight" if head is not None else None,
        vocabulary=tuple(vocabulary),
        optional=_optional(model),
        ignored=re.compile(
            "|".join(f"(?:{p})" for p in (*_BUFFERS, *_patterns(model, "unexpected")))
        ),
    )


def classes(config: PretrainedConfig) -> list[str]:
    """Names of the language models, seeing ones among them, that `config` makes."""
    tables = (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    found = [table[config.model_type] for table in tables if config.model_type in table]
    flat = (name for each in found for name in ([each] if isinstance(each, str) else each))
    return list(dict.fromkeys(flat))


def _optional(model: PreTrainedModel) -> frozenset[str]:
    """Tensors whose values the model's own code has; of buffers, a block asks for its own."""
    missing = re.compile("|".join(_patterns(model, "missing")) or r"(?!)")
    found = {name for name in model.state_dict() if missing.search(name)}
    return frozenset(found | {name for name, _ in model.named_buffers()})


def _patterns(model: PreTrainedModel, kind: str) -> list[str]:
    return sorted(getattr(model, f"_keys_to_ignore_on_load_{kind}") or ())


def _check_decoder(path: Path, config: PretrainedConfig, named: Any) -> None:
    """Fills in the class where there is but one."""
    known = [] if config.is_encoder_decoder else classes(config)
    if named is None and len(known) == 1:
        config.architectures = known
        return
    told = ", ".join(map(str, named)) if isinstance(named, list) and named else config.model_type
    if not known:
        raise SourceError(
            f"{path}: {told} is not a decoder-only language model that transformers knows"
        )
    if not isinstance(named, list) or not named or named[0] not in known:
        raise SourceError(
            f"{path}: {told} is not a decoder-only language model of type {config.model_type}:"
            f" architectures is expected to name {' or '.join(known)}"
        )


def _brief(fault: Exception) -> str:
    text = " ".join(str(fault).split())[:300] or type(fault).__name__
    return f"there is no {text}" if isinstance(fault, KeyError) else text


def interruptible(model: PreTrainedModel) -> None:
    """Lets a forward end before any of its layers where the user wants it to."""
    for layer in (module for module in model.modules() if isinstance(module, nn.Linear)):
        layer.register_forward_pre_hook(_look)


def _look(_layer: nn.Module, _inputs: object) -> None:
    interrupt.check()
