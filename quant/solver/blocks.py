"""The decoder blocks of a model, one at a time: found, filled with their weights, emptied again.

Generic over architectures: the model's own code runs on a skeleton without weights, and what it
passes to its blocks is recorded. Knows no module names; refuses models whose blocks hold no
`nn.Linear`, or weights that are none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from quant.errors import SourceError
from quant.intake import architecture, attention, spelling
from quant.intake.source import Source
from quant.solver import experts
from quant.solver.aside import Kept, Shelf

_PROBE_TOKENS = 64

Call = tuple[tuple[Any, ...], dict[str, Any]]
Pack = Callable[[Tensor], object]  # from a block's states to what it puts out


class Tensors(Protocol):
    """Weights by the source's names."""

    def get(self, name: str) -> Tensor: ...


class Weighted(Protocol):
    """A model on disk: a source, or what was made of it."""

    @property
    def tensors(self) -> Tensors: ...


class Stream:
    """Rows of calibration on their way through the model, as it was and as it is served.

    `hidden` [rows, length, width] is behind the blocks chosen so far, `parent` behind the parent's
    own; with a shelf they lie there, and are read whenever they are asked for. `gap`, float32, is
    the parent's less the served one, inside a block wherever a layer is about to add to both.
    `mask` [rows, length] is true where a token counts, which padding never does; `calls` is what
    each block gets beside the states.
    """

    def __init__(
        self, hidden: Tensor, mask: Tensor, calls: list[Call] | None = None,
        shelf: Shelf | None = None,
    ) -> None:  # fmt: skip
        self.mask, self.shelf = mask, shelf
        self.calls: list[Call] = [] if calls is None else calls
        self.copy = 0  # which of the decoder's copies runs it
        self.hidden = self.parent = hidden
        self.gap = None

    @property
    def hidden(self) -> Tensor:
        return self._hidden.tensor()

    @hidden.setter
    def hidden(self, states: Tensor) -> None:
        self._hidden = Kept(states, self.shelf)

    @property
    def parent(self) -> Tensor:
        return self._parent.tensor()

    @parent.setter
    def parent(self, states: Tensor) -> None:
        self._parent = Kept(states, self.shelf)

    @property
    def gap(self) -> Tensor | None:
        return None if self._gap is None else self._gap.tensor()

    @gap.setter
    def gap(self, states: Tensor | None) -> None:
        self._gap = None if states is None else Kept(states, self.shelf)

    def real(self, inputs: Tensor) -> Tensor:
        """Inputs [rows, length, columns] or flat, of tokens that count: [tokens, columns]."""
        flat, counts = inputs.flatten(0, -2), self.mask.flatten()
        return flat if bool(counts.all()) else flat[counts]


@dataclass(frozen=True, slots=True)
class Decoder:
    """A model without weights, and where its blocks are.

    `text` is the part that the blocks belong to: all but the head, or what is left of a model that
    sees without its vision tower.
    """

    model: PreTrainedModel
    text: nn.Module
    prefix: str  # of the blocks' names, as in "model.layers."
    blocks: Sequence[nn.Module]
    device: torch.device
    stored: Mapping[str, str]  # the source's name of each tensor, by the model's own
    dtype: torch.dtype  # that blocks compute in
    others: tuple[Decoder, ...] = ()  # the same on further devices, for their share of the rows

    def all(self) -> tuple[Decoder, ...]:
        return (self, *self.others)

    def outside(self) -> dict[str, str]:
        """The source's name of each weight of `text` outside the blocks, by the model's own."""
        inside = {id(weight) for block in self.blocks for weight in block.parameters()}
        own = {id(weight) for weight in self.text.parameters()} - inside
        named = self.model.named_parameters()
        return {name: self.stored_as(name) for name, weight in named if id(weight) in own}

    def towers(self) -> list[str]:
        """Parts of the model beside `text` and its head, by a name that no other part has."""
        own = {id(weight) for weight in self.text.parameters()}
        if (head := self.model.get_output_embeddings()) is not None:
            own |= {id(weight) for weight in head.parameters()}
        beside = (name for name, w in self.model.named_parameters() if id(w) not in own)
        before = f"{self.model.base_model_prefix}."
        return sorted({name.removeprefix(before).partition(".")[0] for name in beside})

    def drafts(self, stored: Iterable[str]) -> list[str]:
        """Where weights lie among the tensors `stored` that the model has no place for, as layers
        that predict further tokens: the beginning of their names that none of its own has."""
        own = {self.stored_as(name) for name in self.model.state_dict()}
        known = {name[:end] for name in own for end in _ends(name)}
        beyond = (name for name in stored if name not in own and name.endswith(".weight"))
        starts = ((name[:end] for end in _ends(name)) for name in beyond)
        return sorted({next(start for start in found if start not in known) for found in starts})

    def names(self, place: int) -> dict[str, str]:
        """The source's name of each tensor of a block, by the block's own."""
        return {
            name: self.stored_as(f"{self.prefix}{place}.{name}")
            for name in self.blocks[place].state_dict()
        }

    def stored_as(self, name: str) -> str:
        """The source's name of the model's tensor; the same where it has none."""
        return self.stored.get(name, name)

    def home(self, place: int) -> str:
        """What the source's names of a block's tensors begin with, as in "model.layers.0."."""
        mark = f".{place}."
        before, _, _ = next(iter(self.names(place).values())).partition(mark)
        return before + mark

    def module(self, place: int, name: str) -> str:
        """The source's name of a block's module, by the block's own: both inside the block."""
        tensor = self.stored_as(f"{self.prefix}{place}.{name}.weight")
        return tensor.removeprefix(self.home(place)).removesuffix(".weight")

    def has_experts(self) -> bool:
        return any(isinstance(module, experts.Experts) for module in self.model.modules())

    def left_out(self, place: int) -> list[str]:
        """The source's names of a block's weights that are no layers: the gates of a mixture."""
        weights = self.blocks[place].named_parameters()
        layers = {f"{name}.weight" for name in linears(self.blocks[place])}
        return [
            self.home(place) + self.module(place, name.removesuffix(".weight"))
            for name, weight in weights
            if weight.ndim == 2 and name not in layers
        ]

    def shapes(self) -> dict[str, tuple[int, int]]:
        """The source's name -> (out_features, in_features) of every linear layer in the blocks."""
        return {
            self.home(place) + self.module(place, name): (linear.out_features, linear.in_features)
            for place, block in enumerate(self.blocks)
            for name, linear in linears(block).items()
        }


def _ends(name: str) -> list[int]:
    """Where each part of a dotted name ends."""
    return [place for place, letter in enumerate(name) if letter == "."] + [len(name)]


def spread(
    source: Source, on: Sequence[torch.device], dtype: torch.dtype = torch.float32
) -> Decoder:
    """`skeleton` on the first device, with others like it on the further ones."""
    found = skeleton(source, on[0], dtype)
    return replace(found, others=tuple(skeleton(source, device, dtype) for device in on[1:]))


def skeleton(source: Source, device: torch.device, dtype: torch.dtype = torch.float32) -> Decoder:
    """The source's architecture without weights, to be run on `device` in `dtype`.

    SourceError where its blocks cannot be solved.
    """
    model = hollow(source, device)
    own = spelling.own_names(model, source.tensors.names())
    with init_empty_weights(include_buffers=False):
        experts.unfuse(model, spelling.expert_leaves(model))
    model.eval().requires_grad_(requires_grad=False)
    stored = {name: its for its, name in own.items()}
    depth, text = source.config.get_text_config().num_hidden_layers, model.get_decoder()
    within = {id(module) for module in text.modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth and id(module) in within:
            decoder = Decoder(model, text, f"{name}.", list(module), device, stored, dtype)
            _check(decoder, source)
            return decoder
    raise SourceError(f"{source.architecture} has no list of {depth} decoder blocks")


def hollow(source: Source, device: torch.device) -> PreTrainedModel:
    """The source's architecture as transformers builds it, evaluating: buffers, and no weights.

    SourceError where transformers cannot build it.
    """
    for kind in ("sdpa", attention.EAGER):  # eager is slower, and all that some architectures have
        try:
            with init_empty_weights(include_buffers=False):
                model: PreTrainedModel = architecture.builder(source.config).from_config(
                    source.config, attn_implementation=kind, dtype=torch.float32
                )
            break
        except ValueError as fault:
            reason = f"{source.architecture}: {str(fault).partition('. ')[0]}"
    else:
        raise SourceError(reason)
    attention.settle(model)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model.eval().requires_grad_(requires_grad=False)


def embed(
    decoder: Decoder,
    source: Source,
    rows: Sequence[tuple[Tensor, Tensor]],
    shelves: Sequence[Shelf | None] = (),
) -> tuple[list[Stream], Stream]:
    """A stream per (input_ids, mask), and a short one for probing, before the first block.

    Each stream waits on the shelf in its place of `shelves`; without one, in memory.
    Everything outside the blocks but the output head is read for this, and freed again. With
    several devices, each gets every so many-th stream.
    """
    copies, streams = decoder.all(), {}
    for number, copy in enumerate(copies):
        with embedding(copy, copy.model, source):
            for place in range(number, len(rows), len(copies)):
                ids, mask = (tensor.to(copy.device) for tensor in rows[place])
                shelf = shelves[place] if shelves else None
                streams[place] = _record(copy, ids, mask, shelf)
                streams[place].copy = number
            if copy is decoder:
                ids, mask = (tensor[:1, :_PROBE_TOKENS].to(copy.device) for tensor in rows[0])
                probe = _record(copy, ids, mask)
    return [streams[place] for place in range(len(rows))], probe


def given_beside(decoder: Decoder, source: Source, rows: int, length: int) -> int:
    """Bytes of what so many rows' blocks get beside the states; what several share counts once.

    Found by a forward without memory. Zero where a model's own code cannot be run like that.
    """
    model = architecture.hollow(source.config).to(decoder.dtype)
    attention.settle(model)
    blocks = list(model.get_submodule(decoder.prefix[:-1]).children())
    ids = torch.empty(rows, length, dtype=torch.int64, device="meta")
    try:
        with _Believing():  # type: ignore[no-untyped-call]
            stream = _record(replace(decoder, model=model, blocks=blocks), ids, ids)
    except (RuntimeError, TypeError, ValueError):
        return 0
    sizes = {}
    for place in range(len(blocks)):
        for tensor in _tensors(stream.calls[place]):
            storage = tensor.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


class _Believing(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's own has no types
    """Answers yes where code asks what stands in a tensor without memory: that a row is one text,
    and counts from zero."""

    def __torch_dispatch__(
        self, func: Any, _types: object, args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return args[0].dtype == torch.bool
        return func(*args, **(kwargs or {}))


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(each)


def _check(decoder: Decoder, source: Source) -> None:
    architecture = source.architecture
    for place, block in enumerate(decoder.blocks):
        if not linears(block):
            raise SourceError(f"{architecture}: {decoder.prefix}{place} holds no nn.Linear")
        for name, weight in block.named_parameters():
            if weight.ndim > 2:
                raise SourceError(
                    f"{architecture}: {decoder.prefix}{place}.{name} has {weight.ndim} dimensions;"
                    " only nn.Linear layers can be quantized, and no convolutions"
                )
        lacking = sorted(set(decoder.names(place).values()) - set(source.tensors.names()))
        if lacking:
            raise SourceError(f"{source.folder} lacks {lacking[0]}")


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """By name, gates left out: those of a single output, and those that put out what they chose
    (Phi-3.5-MoE's router). They weigh nothing, and vLLM loads them as they are."""
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and module.out_features > 1 and _multiplies(module)
    }


def _multiplies(linear: nn.Linear) -> bool:
    """Whether it puts out a tensor. That this is the product is for `selfcheck` to find."""
    forward = type(linear).forward
    if forward is nn.Linear.forward:
        return True
    with torch.no_grad():
        return isinstance(forward(linear, linear.weight.new_zeros(1, linear.in_features)), Tensor)


@contextmanager
def filled(
    module: nn.Module,
    names: Mapping[str, str],
    source: Weighted,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Iterator[None]:
    """Holds the source's tensors inside `module`: own name -> the source's. Embeddings stay in
    the stored dtype, the rest is `dtype`."""
    sparse = {f"{name}.weight" for name, m in module.named_modules() if isinstance(m, nn.Embedding)}
    tensors = {}
    for own, name in names.items():
        stored = source.tensors.get(name).to(device)
        tensors[own] = stored if own in sparse else stored.to(dtype)
    with holding(module, tensors):
        yield


@contextmanager
def holding(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """These tensors, by the own names of `module`, inside it; it is empty again afterwards."""
    module.load_state_dict(tensors, strict=False, assign=True)
    try:
        yield
    finally:
        empty = {own: tensor.to("meta") for own, tensor in tensors.items()}
        module.load_state_dict(empty, strict=False, assign=True)


class Enough(Exception):
    """Ends a forward that has shown what it was run for."""


@contextmanager
def embedding(decoder: Decoder, model: PreTrainedModel, source: Source) -> Iterator[None]:
    """Holds what is outside the blocks inside `model`, which is the decoder's or one like it;
    embeddings put out what blocks compute in."""

    def cast(_module: nn.Module, _inputs: object, out: Tensor) -> Tensor:
        return out.to(decoder.dtype)

    with ExitStack() as undo:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                undo.callback(module.register_forward_hook(cast).remove)
        where = decoder.device, decoder.dtype
        undo.enter_context(filled(model, decoder.outside(), source, *where))
        yield


def _record(decoder: Decoder, ids: Tensor, mask: Tensor, shelf: Shelf | None = None) -> Stream:
    """Runs the model around its blocks, noting what it would pass to each."""
    for pack in PACKS:
        try:
            hidden, calls = _noted(decoder, ids, pack)
        except Unpacked:
            continue
        return Stream(hidden, mask, calls, shelf)
    raise SourceError(f"{type(decoder.model).__name__} changes the states between its blocks")


class Unpacked(Exception):
    """A block was given a part of what the one before it put out."""


def _bare(hidden: Tensor) -> object:
    return hidden


def _packed(hidden: Tensor) -> object:
    return (hidden,)


# How a block puts out its states: alone, or as the first of several things that the model takes
# apart. Which it is shows in what the next one is given.
PACKS: tuple[Pack, ...] = (_bare, _packed)


def _noted(decoder: Decoder, ids: Tensor, pack: Pack) -> tuple[Tensor, list[Call]]:
    """The states before the first block, and what each gets beside them; none computes anything."""
    states: list[Tensor] = []
    calls: list[Call] = []

    def note(hidden: Tensor, *args: Any, **kwargs: Any) -> object:
        if states and hidden.shape != states[0].shape:
            raise Unpacked
        states.append(hidden)
        calls.append((args, kwargs))
        if len(calls) == len(decoder.blocks):
            raise Enough
        return pack(hidden)

    with ExitStack() as undo, torch.no_grad():
        for block in decoder.blocks:
            block.forward = note
            undo.callback(delattr, block, "forward")
        try:
            # Real tokens are a prefix of each row: causal attention hides the padding from them,
            # and shows them all to one another, whichever of them count.
            # The whole model is asked, by tokens: some look up more than one embedding of each.
            decoder.model(input_ids=ids, use_cache=False)
        except Enough:
            return states[0], calls
    raise SourceError(f"only {len(calls)} of {len(decoder.blocks)} blocks were called")
