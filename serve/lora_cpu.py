"""LoRA on vLLM's CPU platform: right in mixed batches, and paid for only by the rows that use it.

vLLM's own CPU wrapper gathers one padded copy of the adapter per token and applies the last slot
to the base-model rows of a mixed batch. Here rows are grouped by adapter once per batch, each
layer keeps every slot trimmed to the rank the adapter really has (`serve.lora_delta`), and a batch
without adapters goes straight to the base layers.

What `register()` replaces, and what is expected of it, stands in serve/vllm_internals.py. On other
platforms it does nothing.
"""

from typing import Any, Final

import torch
from torch import Tensor, nn
from vllm.lora import utils as lora_utils
from vllm.lora.layers import VocabParallelEmbeddingWithLoRA, base_linear, fused_moe
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform

from serve import lora_delta
from serve.lora_delta import Delta, Group

WRAPPER: Final = "serve.lora_cpu.GroupedPunica"


def register() -> None:
    """Put the grouped wrapper and layers in the place of vLLM's; idempotent, CPU only."""
    platform = type(current_platform)
    if not current_platform.is_cpu() or platform.get_punica_wrapper() == WRAPPER:
        return
    platform.get_punica_wrapper = classmethod(lambda _: WRAPPER)
    lora_utils._all_lora_classes = tuple(map(_replacement, lora_utils._all_lora_classes))
    # vLLM asks a weight for its device; oneDNN's int8 layers have set theirs to None by then.
    for module in (base_linear, fused_moe):
        module._get_lora_device = _device


def _replacement(layer: type[nn.Module]) -> type[nn.Module]:
    if issubclass(layer, BaseLinearLayerWithLoRA):
        return type(layer.__name__, (GroupedLinear, layer), {})
    return IdleEmbedding if layer is VocabParallelEmbeddingWithLoRA else layer


def _device(base_layer: nn.Module) -> torch.device:  # noqa: ARG001 - vLLM's signature
    return torch.device("cpu")


class GroupedPunica(PunicaWrapperCPU):  # type: ignore[misc]  # vLLM is untyped
    """The row groups of the current batch, and vLLM's punica operations over them.

    Linear layers ask only for `idle` and `groups`; the operations serve whatever else calls
    punica: fully sharded layers, embeddings, logits and classification heads.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.groups: tuple[Group, ...] = ()  # over token rows
        self.prompt_groups: tuple[Group, ...] = ()  # over sampled rows
        self.idle = True  # no row of the batch uses an adapter
        self.native_add = lora_delta.native()

    def update_metadata(self, mapping: Any, *args: Any, **kwargs: Any) -> None:
        super().update_metadata(mapping, *args, **kwargs)
        torch_only = self.native_add is None
        self.groups = lora_delta.group(self.token_lora_indices, slices=torch_only)
        self.prompt_groups = lora_delta.group(self.sampler_indices, slices=True)
        self.idle = not self.groups and not self.prompt_groups

    def _apply_shrink(self, y: Tensor, x: Tensor, w_t_all: Tensor, scale: float) -> None:
        lora_delta.add_slots(y, x * scale, self.groups, w_t_all)

    def _apply_expand(  # noqa: PLR0913 - vLLM's signature
        self,
        y: Tensor,
        x: Tensor,
        w_t_all: Tensor,
        y_offset: int,
        y_slice_size: int,
        add_inputs: bool = True,  # noqa: FBT001, FBT002 - vLLM's signature
    ) -> None:
        part = y[:, y_offset : y_offset + y_slice_size]
        if not add_inputs:
            part.zero_()
        lora_delta.add_slots(part, x, self.groups, w_t_all)

    def add_lora_embedding(
        self,
        y: Tensor,
        x: Tensor,
        lora_b_stacked: Tensor,
        add_inputs: bool = True,  # noqa: FBT001, FBT002 - vLLM's signature
        **_: Any,
    ) -> None:
        self._apply_expand(y, x, lora_b_stacked, 0, y.shape[-1], add_inputs)

    def add_lora_logits(
        self, y: Tensor, x: Tensor, lora_a_stacked: Tensor, lora_b_stacked: Tensor, scale: float
    ) -> None:
        # Most adapters leave the head alone: a look at A saves a product as wide as the vocabulary.
        groups = [each for each in self.prompt_groups if lora_a_stacked[each.slot].any()]
        lora_delta.add_slots(
            y.view(-1, y.shape[-1]),
            x.view(-1, x.shape[-1]) * scale,
            groups,
            lora_a_stacked,
            lora_b_stacked,
        )


class GroupedLinear(BaseLinearLayerWithLoRA):  # type: ignore[misc]  # vLLM is untyped
    """Put before one of vLLM's linear LoRA layers: the base layer as it is, then the deltas."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        # Bound once: a submodule is found through two failed attribute look-ups at every call.
        self._base_forward = base_layer.forward
        self._deltas: dict[int, Delta] = {}

    def reset_lora(self, index: int) -> None:
        self._deltas.pop(index, None)
        super().reset_lora(index)

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        super().set_lora(index, lora_a, lora_b)
        slot_a = [stack[index, 0] for stack in self.lora_a_stacked]
        slot_b = [stack[index, 0] for stack in self.lora_b_stacked]
        if any(len(a) != b.shape[1] for a, b in zip(slot_a, slot_b, strict=True)):
            return  # A is split by rank: such a layer goes through the wrapper's operations
        given = lora_a if isinstance(lora_a, list | tuple) else [lora_a]
        rank = max((len(a) for a in given if a is not None), default=0)  # the rest is padding
        delta = Delta.read([a[:rank] for a in slot_a], [b[:, :rank] for b in slot_b])
        if delta is not None:
            self._deltas[index] = delta

    def forward(self, input_: Tensor) -> Any:
        if self.punica_wrapper.idle:
            return self._base_forward(input_)
        if self.tp_size > 1:  # the delta is added before outputs are gathered or reduced
            return super().forward(input_)
        result = self._base_forward(input_)
        self._add_deltas(input_, result[0] if isinstance(result, tuple) else result)
        return result

    def _apply_lora_to_output(self, x: Tensor, output: Tensor) -> Tensor:
        self._add_deltas(x, output)
        return output

    def _add_deltas(self, inputs: Tensor, output: Tensor) -> None:
        if inputs.ndim > 2:  # [1, tokens, width] in models that transformers runs
            inputs, output = inputs.flatten(0, -2), output.flatten(0, -2)
        native = self.punica_wrapper.native_add
        for each in self.punica_wrapper.groups:
            delta = self._deltas.get(each.slot)
            if delta is None:
                continue
            if native is None:
                delta.add(output, inputs, each.rows)
            else:
                native(output, inputs, delta.down, delta.ups, each.rows)


class IdleEmbedding(VocabParallelEmbeddingWithLoRA):  # type: ignore[misc]  # vLLM is untyped
    """Skips the look-up of adapter rows in batches that use no adapter."""

    def forward(self, x: Tensor) -> Any:
        return self.base_layer(x) if self.punica_wrapper.idle else super().forward(x)
