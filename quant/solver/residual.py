"""Which layers add what they put out to the stream of states that runs past them.

What such a layer puts out can make up for what the stream has lost before it. Found by experiment,
not read off the architecture: with all later layers silent, whatever is added to its outputs must
come out of the block as it is. A norm behind the layer, or a gate, fails that.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from quant.solver.trace import Trace

_TOLERANCE = 0.02  # of a token's largest: 16-bit blocks round what is added once or twice


def adders(block: nn.Module, groups: Sequence[Sequence[str]], trace: Trace) -> list[str]:
    """Their names, in the order they are called; `groups` are of layers that read one input."""
    inputs, output = trace()
    found = []
    for place, group in enumerate(groups):
        layer = block.get_submodule(group[0])
        alone = len(group) == 1 and isinstance(layer, nn.Linear)
        whole = inputs[group[0]].shape[:-1] == output.shape[:-1]  # not some expert's tokens
        if not (alone and whole and layer.out_features == output.shape[-1]):
            continue
        later = [block.get_submodule(name) for names in groups[place + 1 :] for name in names]
        if _adds(layer, later, trace):
            found.append(group[0])
    return found


def _adds(layer: nn.Module, later: Sequence[nn.Module], trace: Trace) -> bool:
    with ExitStack() as undo:
        for other in later:
            undo.callback(other.register_forward_hook(_silent).remove)
        before = trace()[1]
        draw = torch.Generator(before.device).manual_seed(0)
        noise = torch.randn(before.shape, generator=draw, device=before.device)
        more = noise * before.abs().amax(dim=-1, keepdim=True)
        undo.callback(layer.register_forward_hook(lambda _m, _i, out: out + more.to(out)).remove)
        missed = (trace()[1] - before - more).abs().amax(dim=-1)
    return bool((missed <= _TOLERANCE * more.abs().amax(dim=-1)).all())


def _silent(_module: nn.Module, _inputs: object, out: Tensor) -> Tensor:
    return torch.zeros_like(out)
