"""Short forwards of one block that tell what its linear layers read and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from quant.errors import SourceError
from quant.solver import blocks

# What each linear layer reads by its name, in calling order, and the block's output. Names may be
# of groups that read one input, by the first of them.
Trace = Callable[[], tuple[Mapping[str, Tensor], Tensor]]


class Tracer:
    """A short forward that tells what each linear layer read."""

    def __init__(self, block: nn.Module, forward: Callable[[], Tensor]) -> None:
        self._block, self._forward = block, forward

    def __call__(self) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs by name, in calling order, and the block's output."""
        read: dict[str, Tensor] = {}  # held, so that no memory is reused

        def note(_module: nn.Module, args: tuple[Tensor], *, name: str) -> None:
            if name in read:
                raise SourceError(f"{name} is used twice in one block: it has no single input")
            read[name] = args[0]

        with ExitStack() as undo, torch.no_grad():
            for name, linear in blocks.linears(self._block).items():
                hook = linear.register_forward_pre_hook(partial(note, name=name))
                undo.callback(hook.remove)
            return read, self._forward()

    def groups(self) -> list[list[str]]:
        """Linear layers in calling order, those that read the same tensor together."""
        groups: dict[tuple[int, int, int], list[str]] = {}
        for name, inputs in self()[0].items():
            key = (inputs.data_ptr(), inputs.numel(), inputs._version)
            groups.setdefault(key, []).append(name)
        return list(groups.values())
