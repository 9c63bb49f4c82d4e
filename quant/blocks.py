"""The decoder blocks of a model, one at a time: found, filled, run over the calibration rows.

Generic over architectures: the model's own code runs on a skeleton without weights, and what it
passes to its blocks is recorded. Knows no module names; refuses models whose blocks hold no
`nn.Linear`, or weights that are none (fused experts).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from quant import lockstep
from quant.errors import RecipeError, SolveError, SourceError
from quant.source import Source

_PROBE_TOKENS = 8

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(slots=True)
class Stream:
    """Rows of calibration on their way through the model."""

    hidden: Tensor  # [rows, length, width], float32
    mask: Tensor  # [rows, length] bool, true where a token is real
    calls: list[Call] = field(default_factory=list)  # what each block gets beside `hidden`

    def real(self, inputs: Tensor) -> Tensor:
        """Inputs [rows, length, columns] of real tokens only, [tokens, columns]."""
        if bool(self.mask.all()):
            return inputs.flatten(0, -2)
        return inputs[self.mask]


@dataclass(frozen=True, slots=True)
class Decoder:
    """A model without weights, and where its blocks are."""

    model: PreTrainedModel
    prefix: str  # of the blocks' names, as in "model.layers."
    blocks: Sequence[nn.Module]
    device: torch.device

    def linear(self, place: int, name: str) -> nn.Linear:
        """A linear layer by its name inside block `place`."""
        return _linears(self.blocks[place])[name]

    def linears(self) -> dict[str, tuple[int, int]]:
        """Full name -> (out_features, in_features) of every linear layer in the blocks."""
        return {
            f"{self.prefix}{place}.{name}": (linear.out_features, linear.in_features)
            for place, block in enumerate(self.blocks)
            for name, linear in _linears(block).items()
        }


class Solver(Protocol):
    """Who chooses the weights of the linear layers."""

    def seen(self, inputs: Tensor) -> Tensor:
        """What a layer computes with: W8A8 rounds its input, weight-only schemes do not."""

    def visit(
        self, decoder: Decoder, place: int, names: Sequence[str], inputs: Iterator[Tensor]
    ) -> None:
        """Sets the weights of block `place`'s layers `names`, which read [tokens, columns]."""


def device(name: str) -> torch.device:
    """The device of that name; RecipeError unless this machine has it."""
    try:
        found = torch.device(name)
    except RuntimeError as fault:
        raise RecipeError(f"{name!r} is not a device torch knows") from fault
    if found.type not in ("cpu", "cuda"):
        raise RecipeError(f"device {name!r}: cpu or cuda is needed")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"device {name!r}: this torch sees no CUDA device")
    return found


def skeleton(source: Source, device: torch.device) -> Decoder:
    """The source's architecture without weights, to be run on `device`.

    SourceError where its blocks cannot be solved.
    """
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            source.config, attn_implementation="sdpa", dtype=torch.float32
        )
    model.eval().requires_grad_(requires_grad=False)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    depth = source.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            decoder = Decoder(model, f"{name}.", list(module), device)
            _check(decoder, source.architecture)
            return decoder
    raise SourceError(f"{source.architecture} has no list of {depth} decoder blocks")


def embed(
    decoder: Decoder, source: Source, rows: Sequence[tuple[Tensor, Tensor]]
) -> tuple[list[Stream], Stream]:
    """A stream per (input_ids, mask), and a short one for probing, before the first block.

    Everything outside the blocks but the output head is read for this, and freed again.
    """
    outside = {
        name for name, _ in decoder.model.named_parameters() if not name.startswith(decoder.prefix)
    }
    head = {f"lm_head.{kind}" for kind in ("weight", "bias")} & outside
    on_device = [(ids.to(decoder.device), mask.to(decoder.device)) for ids, mask in rows]
    with _filled(decoder.model, {name: name for name in outside - head}, source, decoder.device):
        streams = [_record(decoder, ids, mask) for ids, mask in on_device]
        ids, mask = (tensor[:1, :_PROBE_TOKENS] for tensor in on_device[0])
        probe = _record(decoder, ids, mask)
    return streams, probe


def run(
    decoder: Decoder,
    place: int,
    source: Source,
    streams: tuple[Sequence[Stream], Stream],
    solver: Solver,
) -> None:
    """Runs block `place` over the streams once, `solver` choosing its weights on the way.

    Layers are visited in the order the block calls them, those that share an input together;
    everything downstream already sees the chosen weights. `hidden` of each stream moves on.
    """
    block, (through, probe) = decoder.blocks[place], streams
    names = {name: f"{decoder.prefix}{place}.{name}" for name in block.state_dict()}
    with _filled(block, names, source, decoder.device):
        first = Stream(through[0].hidden[:1, : probe.hidden.shape[1]], probe.mask, probe.calls)
        groups = _groups(block, partial(_forward, block, first, place))
        unreached = _linears(block).keys() - {name for group in groups for name in group}
        if unreached:
            raise SolveError(
                f"{decoder.prefix}{place}.{min(unreached)}: no calibration token reached it"
            )
        forwards = [partial(_forward, block, stream, place) for stream in through]
        with _stops(block, groups, solver), lockstep.lanes(forwards) as lanes:
            for group in groups:
                solver.visit(decoder, place, group, _inputs(lanes, through))
            for lane, stream in zip(lanes, through, strict=True):
                lane.advance()
                stream.hidden = lane.result()


def _check(decoder: Decoder, architecture: str) -> None:
    for place, block in enumerate(decoder.blocks):
        if not _linears(block):
            raise SourceError(f"{architecture}: {decoder.prefix}{place} holds no nn.Linear")
        for name, weight in block.named_parameters():
            if weight.ndim > 2:
                raise SourceError(
                    f"{architecture}: {decoder.prefix}{place}.{name} has {weight.ndim} dimensions;"
                    " only nn.Linear layers can be quantized (no fused experts, no convolutions)"
                )


def _linears(block: nn.Module) -> dict[str, nn.Linear]:
    return {n: module for n, module in block.named_modules() if isinstance(module, nn.Linear)}


@contextmanager
def _filled(
    module: nn.Module, names: Mapping[str, str], source: Source, device: torch.device
) -> Iterator[None]:
    """Holds the source's tensors inside `module`: own name -> the source's. Embeddings stay in
    the stored dtype, the rest is float32."""
    sparse = {f"{name}.weight" for name, m in module.named_modules() if isinstance(m, nn.Embedding)}
    tensors = {}
    for own, name in names.items():
        stored = source.tensors.get(name).to(device)
        tensors[own] = stored if own in sparse else stored.float()
    module.load_state_dict(tensors, strict=False, assign=True)
    try:
        yield
    finally:
        empty = {own: tensor.to("meta") for own, tensor in tensors.items()}
        module.load_state_dict(empty, strict=False, assign=True)


class _Enough(Exception):
    """Ends a forward after its last block."""


def _record(decoder: Decoder, ids: Tensor, mask: Tensor) -> Stream:
    """Runs the model around its blocks, noting what it would pass to each."""
    embedded = decoder.model.get_input_embeddings()(ids).float()
    stream = Stream(embedded, mask)

    def note(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not stream.calls:
            stream.hidden = hidden
        stream.calls.append((args, kwargs))
        if len(stream.calls) == len(decoder.blocks):
            raise _Enough
        return hidden

    with ExitStack() as undo, torch.no_grad():
        for block in decoder.blocks:
            block.forward = note
            undo.callback(delattr, block, "forward")
        try:
            # Real tokens are a prefix of each row: causal attention hides the padding from them.
            decoder.model.base_model(inputs_embeds=embedded, use_cache=False)
        except _Enough:
            return stream
    raise SourceError(f"only {len(stream.calls)} of {len(decoder.blocks)} blocks were called")


def _forward(block: nn.Module, stream: Stream, place: int) -> Tensor:
    args, kwargs = stream.calls[place]
    out = block(stream.hidden, *args, **kwargs)
    hidden: Tensor = out[0] if isinstance(out, tuple) else out
    return hidden


def _groups(block: nn.Module, forward: Callable[[], Tensor]) -> list[list[str]]:
    """Linear layers in calling order, those that read the same tensor together."""
    calls: list[tuple[str, Tensor, int]] = []

    def note(_module: nn.Module, args: tuple[Tensor], *, name: str) -> None:
        if name in {seen for seen, *_ in calls}:
            raise SourceError(f"{name} is used twice in one block: it has no single input")
        calls.append((name, args[0], args[0]._version))  # held, so that no memory is reused

    with ExitStack() as undo, torch.no_grad():
        for name, linear in _linears(block).items():
            hook = linear.register_forward_pre_hook(partial(note, name=name))
            undo.callback(hook.remove)
        forward()
    groups: dict[tuple[int, int, int], list[str]] = {}
    for name, inputs, version in calls:
        groups.setdefault((inputs.data_ptr(), inputs.numel(), version), []).append(name)
    return list(groups.values())


@contextmanager
def _stops(block: nn.Module, groups: Sequence[Sequence[str]], solver: Solver) -> Iterator[None]:
    """The first layer of each group stops its lane; every layer computes with what it sees."""
    leaders = {group[0] for group in groups}

    def meet(_module: nn.Module, args: tuple[Tensor], *, leads: bool) -> tuple[Tensor]:
        inputs = solver.seen(args[0])
        if leads:
            lockstep.stop(inputs)
        return (inputs,)

    with ExitStack() as undo:
        for name, linear in _linears(block).items():
            hook = linear.register_forward_pre_hook(partial(meet, leads=name in leaders))
            undo.callback(hook.remove)
        yield


def _inputs(lanes: Sequence[lockstep.Lane], streams: Sequence[Stream]) -> Iterator[Tensor]:
    for lane, stream in zip(lanes, streams, strict=True):
        lane.advance()
        assert lane.waiting is not None, "a batch ended before its block's last layer"
        yield stream.real(lane.waiting)
