"""From what the last block puts out to logits: the model's own final norm, head and scaling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import torch
from torch import Tensor, nn

from quant.errors import SourceError
from quant.intake.source import Source
from quant.solver import blocks
from quant.solver.blocks import Decoder


@contextmanager
def filled(decoder: Decoder, source: Source) -> Iterator[None]:
    """Holds norms and output head inside the model, in the dtype that its blocks compute in."""
    where = decoder.device, decoder.dtype
    with blocks.filled(decoder.model, _names(decoder, source), source, *where):
        yield


def logits(decoder: Decoder, final: Tensor) -> Tensor:
    """[rows, tokens, vocabulary] of the states `final` [rows, tokens, width] behind the last block.

    The head has to be `filled`. SourceError where the model does not take them.
    """
    for pack in blocks.PACKS:
        with suppress(blocks.Unpacked):
            return _predicted(decoder, final, pack)
    raise SourceError(f"{type(decoder.model).__name__} changes the states between its blocks")


def _names(decoder: Decoder, source: Source) -> dict[str, str]:
    """Norms and output head: own name -> the source's, the embedding's where they are tied."""
    modules = dict(decoder.model.named_modules())
    tables = {f"{n}.weight" for n, m in modules.items() if isinstance(m, nn.Embedding)}
    embedding = decoder.model.get_input_embeddings()
    (table,) = (f"{name}.weight" for name, module in modules.items() if module is embedding)
    head = decoder.model.get_output_embeddings()
    found = {name: stored for name, stored in decoder.outside().items() if name not in tables}
    for name, module in modules.items():
        if module is head:
            for leaf, _ in module.named_parameters():
                stored = decoder.stored_as(f"{name}.{leaf}")
                tied = stored not in source.tensors
                found[f"{name}.{leaf}"] = decoder.stored_as(table) if tied else stored
    return found


def _predicted(decoder: Decoder, final: Tensor, pack: blocks.Pack) -> Tensor:
    """Logits of the model whose every block puts out `final`, whatever it is given."""

    def put_out(given: Tensor, *_args: object, **_kwargs: object) -> object:
        if given.shape != final.shape:
            raise blocks.Unpacked
        return pack(final)

    with ExitStack() as undo:
        instead: dict[nn.Module, Callable[..., object]] = dict.fromkeys(decoder.blocks, put_out)
        for module in decoder.model.modules():
            if isinstance(module, nn.Embedding):  # nobody asks what goes into the blocks
                instead[module] = partial(_nothing, final, module.embedding_dim)
        for module, forward in instead.items():
            module.forward = forward
            undo.callback(delattr, module, "forward")
        tokens = final.new_zeros(final.shape[:2], dtype=torch.int64)
        found: Tensor = decoder.model(input_ids=tokens, use_cache=False).logits
    if found.shape[:2] != final.shape[:2]:  # of a model with a single block
        raise blocks.Unpacked
    return found


def _nothing(like: Tensor, width: int, tokens: Tensor, *_args: object, **_kwargs: object) -> Tensor:
    return like.new_zeros(*tokens.shape, width)
