"""Random vectors of the predictions' Fisher information, sent back to where the last block ends.

At every token the KL of predictions to second order is half of d^T F d for what changes in the
logits, F = diag(p) - p p^T: the mean of (v . d)^2 / 2 for random v of covariance F. Reads what is
outside the blocks, once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial

import torch
from torch import Tensor, nn

from quant.intake.source import Source
from quant.solver import blocks
from quant.solver.blocks import Decoder, Stream


def gradient(decoder: Decoder, source: Source, stream: Stream) -> Tensor:
    """Of v . logits, one v for each token, where the last block ends."""
    draw = torch.Generator().manual_seed(0)
    where = decoder.device, decoder.dtype
    with blocks.filled(decoder.model, _outside(decoder, source), source, *where):
        rows = zip(torch.split(stream.hidden, 1), torch.split(stream.mask, 1), strict=True)
        return torch.cat([_of_predictions(decoder, *row, draw) for row in rows])


def _outside(decoder: Decoder, source: Source) -> dict[str, str]:
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


def _of_predictions(
    decoder: Decoder, hidden: Tensor, mask: Tensor, draw: torch.Generator
) -> Tensor:
    """The model's own head, run on what the blocks put out, and back."""
    final = hidden.detach().requires_grad_()
    for pack in blocks.PACKS:
        with suppress(blocks.Unpacked), torch.enable_grad():
            logits = _predicted(decoder, final, pack)[mask]
            break
    root = logits.detach().float().softmax(dim=-1).sqrt_()  # [tokens, vocabulary]
    back = torch.randn(root.shape, generator=draw).to(root.device).mul_(root)
    back -= root.square_().mul_(back.sum(dim=-1, keepdim=True))
    return torch.autograd.grad(logits, final, back.to(logits.dtype))[0]


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
        tokens = torch.zeros(final.shape[:2], dtype=torch.int64, device=final.device)
        found: Tensor = decoder.model(input_ids=tokens, use_cache=False).logits
    return found


def _nothing(like: Tensor, width: int, tokens: Tensor, *_args: object, **_kwargs: object) -> Tensor:
    return like.new_zeros(*tokens.shape, width)
