"""The tensors of a GGUF file as the model's: dequantized to bfloat16 when asked for, some rows at a
time. Every one of the file has a place in the model, and every one of the model is in the file.

Which is which, the gguf package's table says.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from gguf import MODEL_ARCH_NAMES, dequantize, get_tensor_name_map
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from quant import interrupt
from quant.errors import SourceError
from quant.intake import architecture, spelling
from quant.intake.gguf_header import Header, Place
from quant.intake.spelling import Part, Shape
from quant.intake.stored import Weight

DTYPE = torch.bfloat16
CHUNK = 1 << 22  # numbers that are dequantized together
_EXPERTS = re.compile(r"(?:.*\.)?layers\.(\d+)\.\w+\.experts\.(gate_up|down)_proj")
_TURNED = re.compile(r"\.attn_([qk])\.")


class Layout(NamedTuple):
    """How llama.cpp stores what it changes: `turned` are the rows of queries and keys, in pairs;
    `shift` was added to the norms."""

    turned: bool = False
    shift: float = 0.0


class _Piece(NamedTuple):
    """Rows [first, first + many) of one of the file's tensors."""

    name: str
    first: int
    many: int


def rows(path: Path, place: Place, first: int, count: int) -> npt.NDArray[np.float32]:
    """Those rows in float32, [count, width]. SourceError where the file cannot be read."""
    width = place.size // place.rows  # bytes
    try:
        with path.open("rb") as file:
            file.seek(place.begin + first * width)
            raw = np.fromfile(file, np.uint8, count * width)
        with np.errstate(all="ignore"):  # what is not finite is refused where it is used
            values: npt.NDArray[np.float32] = dequantize(raw.reshape(count, width), place.kind)
    except (OSError, ValueError) as fault:
        raise SourceError(f"{path} cannot be read as a GGUF model: {fault}") from fault
    except NotImplementedError as fault:
        raise SourceError(f"{path}: its type {place.kind.name} cannot be dequantized") from fault
    return values


def weights(
    header: Header, config: PretrainedConfig, layout: Layout, others: Collection[str]
) -> dict[str, Weight]:
    """The model's tensors by the names that the hub has for them, as `config` has them.

    `others` are tensors of the file that are no weights. SourceError names what is missing, left
    over or of another shape.
    """
    model = architecture.hollow(config)
    own = architecture.outline(config).shapes
    pieces = dict(_pieces(header, model, own))
    used = {piece.name for piece in pieces.values()}
    if left := sorted(header.tensors.keys() - used - set(others)):
        raise header.refused(
            f"it holds {', '.join(left[:4])}, and {config.architectures[0]} has no place for"
            f" {'it' if len(left) == 1 else f'these {len(left)}'}"
        )
    shapes = _published(model, own)
    return {name: _weight(header, piece, shapes[name].shape, config, layout)
            for name, piece in pieces.items()}  # fmt: skip


def _published(model: PreTrainedModel, own: Mapping[str, Shape]) -> dict[str, Part]:
    if spelling.expert_leaves(model) is not None:
        return spelling.published(model, own)
    return {name: Part(name, 0, shape) for name, shape in own.items()}


def _pieces(
    header: Header, model: PreTrainedModel, own: Mapping[str, Shape]
) -> Iterator[tuple[str, _Piece]]:
    """By published name: where each tensor of the model lies."""
    kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(
        kinds[header.metadata["general.architecture"]], model.config.num_hidden_layers
    )
    for name, part in _published(model, own).items():
        shape = own[part.of]
        if fused := _EXPERTS.fullmatch(part.of):
            piece = _of_expert(int(fused[1]), fused[2], part, shape)
            expected: Shape = (shape[0], piece.many, shape[2])
        else:
            module, _, leaf = part.of.rpartition(".")
            piece = _Piece(f"{names.get_name(module)}.{leaf}", 0, math.prod(shape[:-1]))
            expected = shape
        place = header.tensors.get(piece.name)
        if place is None:
            raise header.refused(f"it lacks {piece.name} ({name})")
        if place.shape != expected and (1, *place.shape) != expected:
            raise header.refused(
                f"{piece.name} is {list(place.shape)}, and its keys say {list(expected)}"
            )
        yield name, piece


def _of_expert(layer: int, fused: str, part: Part, shape: Shape) -> _Piece:
    """llama.cpp has gate and up apart, and all experts of a layer in one tensor."""
    count = part.shape[0]
    expert, within = divmod(part.first, shape[1])
    leaf = "down" if fused == "down" else ("up" if within else "gate")
    return _Piece(f"blk.{layer}.ffn_{leaf}_exps.weight", expert * count, count)


def _weight(
    header: Header, piece: _Piece, shape: Shape, config: PretrainedConfig, layout: Layout
) -> Weight:
    shift = layout.shift if piece.name.endswith("norm.weight") else 0.0
    read: Callable[[], Tensor] = partial(_read, header, piece, shape, shift)
    turned = _TURNED.search(piece.name) if layout.turned else None
    if turned:
        heads = config.num_attention_heads if turned[1] == "q" else config.num_key_value_heads
        read = partial(_straight, read, heads)
    return Weight(header.path, shape, DTYPE, read)


def _read(header: Header, piece: _Piece, shape: Shape, shift: float) -> Tensor:
    place = header.tensors[piece.name]
    made = torch.empty(piece.many, place.shape[-1], dtype=DTYPE)
    step = max(1, CHUNK // place.shape[-1])
    for first in range(0, piece.many, step):
        interrupt.check()
        count = min(step, piece.many - first)
        values = torch.from_numpy(rows(header.path, place, piece.first + first, count))
        made[first : first + count] = values - shift if shift else values
    return made.reshape(shape)


def _straight(read: Callable[[], Tensor], heads: int) -> Tensor:
    """Rows as transformers rotates them: a head's first half, then its second."""
    paired = read()
    return paired.reshape(heads, -1, 2, *paired.shape[1:]).transpose(1, 2).reshape(paired.shape)
