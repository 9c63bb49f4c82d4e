"""The one door for tensors: whoever wrote them, they are held to the architecture by their headers.

Every tensor of the model is there once, of its shape, in full precision, under a name that loaders
find. Refuses what is missing, left over, empty, quantized or an adapter, by name and in one line,
before any work. Reads numbers only of a head that config.json ties and the files hold as well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from quant.errors import SourceError
from quant.intake import architecture, config_json
from quant.intake.architecture import Outline
from quant.intake.spelling import Key
from quant.intake.stored import Weight

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_WRAPPERS = re.compile(
    r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_flat_param)\."
)
_ADAPTER = re.compile(r"\.(?:lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer)\b")
_QUANTIZED = re.compile(
    r"\.(?:qweight|qzeros|scales|g_idx|W_q|SCB|\w*absmax|\w*quant_map|\w*quant_state\w*"
    r"|(?:weight|input|output)_(?:scale|scale_inv|zero_point|packed|shape|format)"
    r"|scale_(?:weight|input)|_data|_scale)\b"
)
_MOST_PARTS = 8  # of a name, that a trainer put before the model's own
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# Layers that predict further tokens: servers load them for speculation, transformers does not.
_FURTHER = re.compile(r"(?:^|\.)mtp(?:\b|_)")
_PREDICTING = re.compile(r"\.(?:eh_proj|enorm|hnorm|shared_head)\.")  # of a layer that has no name
_MASKS = ("bias", "masked_bias", "position_ids", "inv_freq")  # old files keep them, as integers

Weights = Mapping[str, Weight]


class Tensor(NamedTuple):
    """A tensor that was given under one name and is to have another, or the same."""

    name: str
    given: str


@dataclass(frozen=True, slots=True)
class Admitted:
    """`tensors` by their key, then those that loaders pass over by their name.

    Of those that config.json ties, `copies` hold what they are tied to, and `untied` other numbers.
    """

    tensors: dict[str, Tensor]
    copies: frozenset[str]
    untied: frozenset[str]

    @property
    def renamed(self) -> bool:
        return any(tensor.name != tensor.given for tensor in self.tensors.values())


def admitted(weights: Weights, outline: Outline, where: Path) -> Admitted:
    """The architecture's tensors among `weights`; SourceError names `where` and what differs."""
    bare = _bare(weights, outline, where)
    keys = outline.spelling.keys(bare)
    rest = sorted(bare.keys() - keys.keys())
    further = _further(rest, outline)
    passed = [name for name in rest if name in further or outline.ignored.search(name)]
    unknown = sorted(set(rest) - set(passed))
    _check_origin(unknown, where)
    held = _held(bare, keys, outline, where)
    _check_missing(held, outline, where)
    if unknown:
        _refuse_unknown(unknown, outline, where)
    for key, tensor in held.items():
        _check_shape(key, tensor, weights[tensor.given], outline, where)
    passed = [name for name in passed if not _is_mask(name, weights[bare[name]])]
    tensors = held | {name: Tensor(name, bare[name]) for name in passed}
    for tensor in tensors.values():
        check_float(tensor.name, weights[tensor.given])
    tied = {key: of for key, of in outline.tied.items() if {key, of} <= held.keys()}
    copies = {k for k, of in tied.items() if _same(*(weights[held[n].given] for n in (k, of)))}
    return Admitted(tensors, frozenset(copies), frozenset(tied.keys() - copies))


def check_float(name: str, weight: Weight) -> None:
    """SourceError where a tensor is no full-precision numbers."""
    if weight.dtype not in FLOATS:
        dtype = str(weight.dtype).removeprefix("torch.")
        raise SourceError(
            f"{weight.path}: {name} is {dtype}: not full-precision weights. Give the checkpoint"
            " from before it was quantized"
        )


def outline(home: Path, weights: Weights) -> Outline:
    """Of the model whose config.json lies in `home`, once nothing in it contradicts `weights`.

    SourceError, before anything of config.json's size is built.
    """
    path, config = home / config_json.FILE, architecture.config(home)
    _check_section(config_json.read(home), weights, path)
    depth = config.get_text_config().num_hidden_layers
    if depth > len(weights):
        raise SourceError(
            f"{path}: num_hidden_layers is {depth}, and there are {len(weights)} tensors"
        )
    return architecture.outline(config)


def quantized(weights: Weights) -> str | None:
    """A tensor that only quantized files have; None in full precision."""
    odd = (n for n, w in weights.items() if w.dtype not in FLOATS or _QUANTIZED.search(n))
    return min(odd, default=None)


def _check_section(config: Mapping[str, Any], weights: Weights, path: Path) -> None:
    """Says whether the tensors are quantized as well."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    if not any(part.get("quantization_config") is not None for part in parts):
        return
    if (name := quantized(weights)) is not None:
        raise SourceError(
            f"{path} has a quantization_config: the model is quantized already ({name}). Give"
            " the checkpoint from before it was quantized"
        )
    raise SourceError(
        f"{path} has a quantization_config, and its tensors are full precision: remove the section"
    )


def _bare(weights: Weights, outline: Outline, where: Path) -> dict[str, str]:
    """Names without what wrappers and trainers put into them -> names as given."""
    found: dict[str, str] = {}
    for name in weights:
        _put(found, _WRAPPERS.sub("", name), name, where)
    prefix = _prefix(found, outline)
    if prefix is None:
        _check_origin(found, where)
        raise SourceError(
            f"{where} has no {outline.spelling.hub.get(outline.embedding, outline.embedding)}:"
            " config.json is of another model, or the checkpoint is not whole"
        )
    stripped: dict[str, str] = {}
    for name, given in found.items():
        _put(stripped, name.removeprefix(prefix), given, where)
    return stripped


def _put(into: dict[str, str], name: str, given: str, where: Path) -> None:
    if name in into:
        raise SourceError(
            f"{where} has {into[name]} and {given}, which are one tensor: leave one of them"
        )
    into[name] = given


def _prefix(names: Iterable[str], outline: Outline) -> str | None:
    """What stands before every name: before the embedding's, or before the head's that it is."""
    tied = [key for key, of in outline.tied.items() if of == outline.embedding]
    for anchor in (outline.embedding, *tied):
        leaf = anchor.rpartition(".")[2]
        whole = [name.split(".") for name in names if name.endswith(f".{leaf}")]
        for cut in range(min(max(map(len, whole), default=0), _MOST_PARTS)):
            tails = {".".join(parts[cut:]): parts[:cut] for parts in whole if len(parts) > cut}
            keys = outline.spelling.keys(tails)
            if at := [tail for tail, key in keys.items() if key.name == anchor]:
                return "".join(f"{part}." for part in tails[min(at)])
    return None


def _further(names: Collection[str], outline: Outline) -> set[str]:
    """Those of layers that predict further tokens, by name or behind the last one."""
    config = outline.config.get_text_config()
    depth, more = config.num_hidden_layers, getattr(config, "num_nextn_predict_layers", None)
    behind = range(depth, depth + (more if isinstance(more, int) else 0))
    places = {name: int(at[1]) for name in names if (at := _LAYER.search(name))}
    told = {place for name, place in places.items() if _PREDICTING.search(name)}
    return {
        name
        for name in names
        if _FURTHER.search(name)
        or ((place := places.get(name, -1)) in behind or (place >= depth and place in told))
    }


def _check_origin(names: Iterable[str], where: Path) -> None:
    """Names that tell why they are there."""
    for name in names:
        if _ADAPTER.search(name):
            raise SourceError(
                f"{where} holds a LoRA adapter ({name}): merge it (PEFT's merge_and_unload) and"
                " save the model again, or save it with PEFT and give it as --adapter"
            )
        if _QUANTIZED.search(name):
            raise SourceError(
                f"{where} holds quantized weights ({name}): give the checkpoint from before it was"
                " quantized"
            )


def _held(
    bare: Mapping[str, str], keys: Mapping[str, Key], outline: Outline, where: Path
) -> dict[str, Tensor]:
    """By key. A tied tensor stands for what it is tied to, where that is missing."""
    spelled, given = outline.spelling, dict[str, str]()
    for name in keys:
        _put(given, keys[name].name, name, where)
    for own, parts in spelled.parts.items():
        if own in given and parts != {own} and (both := sorted(parts & given.keys())):
            raise SourceError(f"{where} has {given[both[0]]} and {given[own]}: leave one of them")
    found = {
        key: Tensor(name if keys[name].plain else spelled.hub.get(key, key), bare[name])
        for key, name in given.items()
    }
    for key, of in outline.tied.items():
        if key in found and of not in found:
            found[of] = Tensor(spelled.hub.get(of, of), found.pop(key).given)
    return found


def _check_missing(held: Collection[str], outline: Outline, where: Path) -> None:
    spelled = outline.spelling
    needed = (n for n in outline.shapes if n not in held and n not in outline.optional)
    keys = {part for own in needed for part in spelled.parts[own] if part not in held}
    if not keys:
        return
    lacking = sorted(spelled.hub.get(key, key) for key in keys)
    hint = ", with tie_word_embeddings false" if keys == {outline.head} else ""
    raise SourceError(
        f"{where} lacks {lacking[0]}, one of {len(lacking)} that config.json asks for{hint}: save"
        " the model whole, or give the config.json that belongs to it"
    )


def _refuse_unknown(names: Sequence[str], outline: Outline, where: Path) -> NoReturn:
    depth = outline.config.get_text_config().num_hidden_layers
    deeper = any(int(at[1]) >= depth for name in names if (at := _LAYER.search(name)))
    hint = f": num_hidden_layers is {depth} there" if deeper else ": remove it, or correct the file"
    raise SourceError(
        f"{where} has {names[0]}, one of {len(names)} tensors that config.json does not ask"
        f" for{hint}"
    )


def _check_shape(key: str, tensor: Tensor, weight: Weight, outline: Outline, where: Path) -> None:
    """Rows of a vocabulary may be more or fewer."""
    shapes = outline.spelling.shapes[key]
    if not math.prod(weight.shape) and all(math.prod(shape) for shape in shapes):
        raise SourceError(
            f"{where}: {tensor.given} is empty, {list(weight.shape)}: the model was saved under"
            " DeepSpeed ZeRO-3 without gathering its weights. Give the checkpoint that DeepSpeed"
            " wrote (global_step...), or save with stage3_gather_16bit_weights_on_model_save"
        )
    free = 1 if key in outline.vocabulary else 0
    if (len(weight.shape), weight.shape[free:]) not in {(len(s), s[free:]) for s in shapes}:
        expected = " or ".join(str(list(shape)) for shape in sorted(shapes))
        raise SourceError(
            f"{where}: {tensor.given} is {list(weight.shape)}, config.json says {expected}"
        )


def _is_mask(name: str, weight: Weight) -> bool:
    """What old files keep beside weights: nothing that anybody loads."""
    return name.rpartition(".")[2] in _MASKS and weight.dtype not in FLOATS


def _same(one: Weight, other: Weight) -> bool:
    """Whether both hold the same numbers, read a few rows at a time."""
    if one.shape != other.shape:
        return False
    wide = torch.promote_types(one.dtype, other.dtype)
    pairs = zip(one.pieces(), other.pieces(), strict=True)
    return all(torch.equal(mine.to(wide), theirs.to(wide)) for mine, theirs in pairs)
