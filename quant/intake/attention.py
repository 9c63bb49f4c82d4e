"""Attention as a model's own code computes it.

Layers hand all they have to one function of several that do the same; `sdpa`, the fastest, passes
over what it has no parameter for, such as the soft cap of Gemma-2's scores, without a word. `eager`
is the model's own code and slower.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from types import FunctionType

from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

EAGER = "eager"
_TAKEN = frozenset(inspect.signature(sdpa_attention_forward).parameters)


def settle(model: PreTrainedModel) -> None:
    """Makes the model compute with all that its layers hand over."""
    if any(_loses(module) for module in model.modules()):
        model.set_attn_implementation(EAGER)


def is_eager(model: PreTrainedModel) -> bool:
    """Whether scores [heads, length, length] are held whole."""
    return bool(model.get_decoder().config._attn_implementation == EAGER)


def _loses(module: nn.Module) -> bool:
    """Whether `sdpa` passes over something that the layer has, and its own code reads."""
    return any(
        attribute is None or getattr(module, attribute, None) is not None
        for attribute in _unread(type(module))  # type: ignore[arg-type] # a class hashes
    )


@cache
def _unread(kind: type[nn.Module]) -> tuple[str | None, ...]:
    """The layer's attribute behind each argument that only its own code reads; None for what is
    worked out on the way."""
    own = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
    if not isinstance(own, FunctionType):
        return ()
    read = {*own.__code__.co_varnames, *map(str, own.__code__.co_consts)} - _TAKEN
    return tuple(_attribute(value) for name, value in _arguments(kind) if name in read)


def _arguments(kind: type[nn.Module]) -> Iterator[tuple[str, ast.expr]]:
    """What the layer's forward hands to functions that are not its own, by name."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Name):
            yield from ((word.arg, word.value) for word in call.keywords if word.arg is not None)


def _attribute(value: ast.expr) -> str | None:
    if isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name):
        return value.attr
    return None
