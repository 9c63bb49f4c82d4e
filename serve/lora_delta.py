"""An adapter's change to a layer, over the rows of a batch that use it. Knows nothing of vLLM.

Weights are kept in float32: small bfloat16 products are slower on every x86 CPU measured, and far
slower on those without native bfloat16. Rows take one C++ call (lora_cpu.cpp), which gives a row
the same bits whatever shares its batch; where it could not be built, PyTorch's products serve.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from serve import kernels_native

# The rows of a batch that use one adapter: all of them (None), one run (slice), or scattered.
Rows = slice | Tensor | None
NativeAdd = Callable[[Tensor, Tensor, Tensor, tuple[Tensor, ...], Rows], None]


@cache
def native() -> NativeAdd | None:
    """The call of lora_cpu.cpp, compiled on the machine's first use; None where it cannot be."""
    if not kernels_native.load() or not hasattr(torch.ops.quantserve, "lora_add"):
        return None
    call: NativeAdd = torch.ops.quantserve.lora_add.default
    return call


@dataclass(frozen=True, slots=True)
class Group:
    """The rows of one batch that one adapter slot applies to."""

    slot: int
    rows: Rows


def group(slots: Tensor, *, slices: bool) -> tuple[Group, ...]:
    """Rows by adapter from one slot per row, int64 [rows]; rows of slot -1 (base) are left out.

    slices: whether rows in one run may be a slice, which the C++ call cannot take.
    """
    used = sorted(set(slots.tolist()) - {-1})
    return tuple(
        _group(slot, (slots == slot).nonzero()[:, 0], len(slots), slices=slices) for slot in used
    )


def _group(slot: int, index: Tensor, total: int, *, slices: bool) -> Group:
    first, end = int(index[0]), int(index[-1]) + 1
    if len(index) == total:
        return Group(slot, None)
    if slices and end - first == len(index):
        return Group(slot, slice(first, end))
    return Group(slot, index)


@dataclass(frozen=True, slots=True)
class Delta:
    """One adapter's change to one layer: float32, without the padding of its slot."""

    down: Tensor  # [sum of ranks, inputs]: the slices' A, one below the other
    ups: tuple[Tensor, ...]  # per slice: B as [rank, outputs]
    ranks: tuple[int, ...]  # per slice; 0 where the adapter leaves the slice alone
    widths: tuple[int, ...]  # per slice: outputs

    @classmethod
    def read(cls, lora_a: Iterable[Tensor], lora_b: Iterable[Tensor]) -> "Delta | None":
        """From one slot's A [rank, inputs] and B [outputs, rank] per slice; None if all zero."""
        pairs = [_used(a, b) for a, b in zip(lora_a, lora_b, strict=True)]
        downs, ups = tuple(down for down, _ in pairs), tuple(up for _, up in pairs)
        ranks = tuple(map(len, ups))
        if not any(ranks):
            return None
        return cls(torch.cat(downs), ups, ranks, tuple(up.shape[1] for up in ups))

    def add(self, output: Tensor, inputs: Tensor, rows: Rows) -> None:
        """output [tokens, sum of widths] += inputs [tokens, inputs] @ A @ B, on those rows."""
        hidden = torch.mm(_gather(inputs, rows), self.down.t())  # [rows, sum of ranks]
        wide = _gather(output, rows)
        if len(self.ups) == 1:
            wide.addmm_(hidden, self.ups[0])
        else:
            outputs = wide.split_with_sizes(self.widths, 1)
            hiddens = hidden.split_with_sizes(self.ranks, 1)
            for part, of_slice, up in zip(outputs, hiddens, self.ups, strict=True):
                part.addmm_(of_slice, up)
        _scatter(output, rows, wide)


def _used(lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
    """A [rank, inputs] and B [rank, outputs] in float32, of the ranks that put anything out."""
    down, up = lora_a.float(), lora_b.t().contiguous().float()
    used = (down.abs().amax(1) != 0) & (up.abs().amax(1) != 0)
    return (down, up) if bool(used.all()) else (down[used], up[used])


def add_slots(output: Tensor, inputs: Tensor, groups: Iterable[Group], *stacks: Tensor) -> None:
    """output += inputs @ stack.T @ ..., per group, straight from slots [slot, 1, out, in]."""
    width = min(output.shape[1], stacks[-1].shape[-2])  # either may be padded
    part = output[:, :width]
    for each in groups:
        product = _gather(inputs, each.rows)
        for stack in stacks:
            product = product @ stack[each.slot, 0].float().t()
        wide = _gather(part, each.rows)
        wide += product[:, :width]
        _scatter(part, each.rows, wide)


def _gather(batch: Tensor, rows: Rows) -> Tensor:
    """Those rows as float32; a view where no copy is needed."""
    if isinstance(rows, Tensor):
        return batch.index_select(0, rows).float()
    return (batch if rows is None else batch[rows]).float()


def _scatter(batch: Tensor, rows: Rows, wide: Tensor) -> None:
    """Put back what `_gather` took, unless it was a view; rounds once to the batch's dtype."""
    if isinstance(rows, Tensor):
        batch.index_copy_(0, rows, wide.to(batch.dtype))
    elif batch.dtype is not torch.float32:
        (batch if rows is None else batch[rows]).copy_(wide)
