"""Opens the model a user has: a Hugging Face or trainer's folder, a GGUF file, a hub id, `demo`.

Tensors are read one at a time, adapters merged into them on the way. Refuses damaged shards,
models that are quantized already, and anything but a decoder-only language model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from httpx2 import HTTPError  # what huggingface_hub speaks with; a proxy's refusal escapes it
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from torch import Tensor
from transformers import PretrainedConfig

from quant import artifact, beforehand, companions, interrupt, paths
from quant.artifact import Fingerprint
from quant.errors import ArtifactError, SourceError, during
from quant.headers import Headers, TensorHeader
from quant.intake import (
    architecture,
    around,
    config_json,
    corrected,
    door,
    files,
    fused,
    gguf,
    remodel,
    stored,
    trainer,
    vocabulary,
)
from quant.intake.architecture import Outline
from quant.intake.corrected import Correction
from quant.intake.door import Admitted
from quant.intake.stored import Stored
from quant.lora import adapter as lora
from quant.lora import anatomy, merge, placement
from quant.lora.adapter import Adapter
from quant.lora.training import AS_STORED, Training

DEMO = beforehand.DEMO
CACHE = Path("~/.cache/quantserve")
_HUB_FILES = ["config.json", "*.safetensors", artifact.INDEX, *companions.ALL]
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}

Say = Callable[[str], None]  # one line about what is happening now


@dataclass(frozen=True, slots=True)
class Tensors:
    """The parent's tensors, read when asked for; every call reads anew and keeps nothing.

    `rounded` are those that training saw in NF4, and whether they are stored [in, out].
    """

    folder: Path
    headers: Mapping[str, TensorHeader]
    adapters: tuple[Adapter, ...] = ()
    training: Training = AS_STORED
    rounded: Mapping[str, bool] = field(default_factory=dict)

    def names(self) -> tuple[str, ...]:
        return tuple(self.headers)

    def get(self, name: str) -> Tensor:
        """In the stored dtype, or in float32 where it is not what is stored."""
        header = self._header(name)
        with during(f"reading {name} of {self.folder / header.file}"):
            return self._get(name, header)

    def _get(self, name: str, header: TensorHeader) -> Tensor:
        kind = _dtype(self.folder, name, header)
        tensor = Stored.plain(self.folder / header.file, header.begin, kind, header.shape).read()
        return self.changed(name, tensor)

    def changed(self, name: str, stored: Tensor) -> Tensor:
        """What training's rounding and the adapters make of `stored`, the parent's own tensor."""
        if name in self.rounded:
            stored = self.training.seen(stored, turned=self.rounded[name])
        return merge.merged(stored, self.adapters, name) if self._is_merged(name) else stored

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that `get` returns."""
        return torch.float32 if self.is_changed(name) else self.stored_dtype(name)

    def stored_dtype(self, name: str) -> torch.dtype:
        return _dtype(self.folder, name, self._header(name))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._header(name).shape

    def is_changed(self, name: str) -> bool:
        """Whether `get` returns something else than is stored."""
        return name in self.rounded or self._is_merged(name)

    def _is_merged(self, name: str) -> bool:
        return any(merge.touches(adapter, name) for adapter in self.adapters)

    def __contains__(self, name: object) -> bool:
        return name in self.headers

    def _header(self, name: str) -> TensorHeader:
        if name not in self.headers:
            raise SourceError(f"{self.folder} has no tensor named {name}")
        return self.headers[name]


@dataclass(frozen=True, slots=True)
class Source:
    """`fingerprint` is of the parent alone; `dtype` is what the parent is served in."""

    folder: Path
    spec: str
    config: PretrainedConfig
    dtype: torch.dtype
    fingerprint: Fingerprint
    adapters: tuple[Adapter, ...]
    tensors: Tensors
    cache: Path
    training: Training = AS_STORED

    @property
    def architecture(self) -> str:
        return str(self.config.architectures[0])

    @property
    def bytes(self) -> int:
        """Bytes of the parent's tensors on disk."""
        return sum(header.end - header.begin for header in self.tensors.headers.values())


@dataclass(frozen=True, slots=True)
class Plain:
    """A folder that went through the door: `headers` are those of its weights, `left_out` names
    what else lies in its files."""

    folder: Path
    config: PretrainedConfig
    headers: Headers
    left_out: Collection[str]


def quiet(_line: str) -> None:
    """A `Say` for callers with nobody to tell."""


def plain(spec: str, cache: Path | None = None, say: Say = quiet) -> Plain:
    """The model behind `spec` as `open` takes it, by its headers alone. SourceError."""
    cache = _cache(cache)
    folder, left_out = _plain(_folder(spec, cache, say), cache, say)
    headers = _without(_headers(folder), left_out)
    return Plain(folder, architecture.config(folder), headers, left_out)


def open(
    spec: str,
    *,
    adapters: Sequence[Path] = (),
    training: Training = AS_STORED,
    cache: Path | None = None,
    say: Say = quiet,
) -> Source:
    """The model behind `spec`, checked whole, with `adapters` merged as its tensors are read.

    Reads every byte of the weights once, for the fingerprint. `training` is how the adapters were
    trained. `cache` keeps converted GGUF files and checkpoints. SourceError or AdapterError name
    what is missing, damaged or does not fit.
    """
    cache = _cache(cache)
    found = plain(spec, cache, say)
    folder, config, headers = found.folder, found.config, found.headers
    parent = fingerprint(found)
    opened = training.adapters(adapters)
    for adapter in opened:
        lora.check_lineage(adapter, parent.weights)
    parts = anatomy.of(config, headers) if opened or training.rounds else None
    made_over = folder
    if parts is not None and opened:
        opened = tuple(placement.placed(adapter, parts.names) for adapter in opened)
        made_over = remodel.fitted(folder, parts, headers, opened, cache)
    if made_over != folder:
        say("the adapter changes the head or the vocabulary: reading a copy that has room for it")
        folder, config = made_over, architecture.config(made_over)
        headers = _without(_headers(folder), found.left_out)
    dtype = _served_dtype(folder, config, headers)
    rounded = parts.linears if parts is not None and training.rounds else {}
    tensors = Tensors(folder, headers, opened, training, rounded)
    return Source(folder, spec, config, dtype, parent, opened, tensors, cache, training)


def fingerprint(found: Plain) -> Fingerprint:
    """Reads every byte of the weights. SourceError."""
    try:
        return Fingerprint(
            weights=artifact.weights_fingerprint(found.folder, found.headers),
            tokenizer=artifact.tokenizer_fingerprint(found.folder),
        )
    except ArtifactError as fault:
        raise SourceError(str(fault)) from fault


def _cache(asked: Path | None) -> Path:
    return paths.full(asked or CACHE).absolute()


def _headers(folder: Path) -> Headers:
    try:
        return fused.headers(folder)
    except ArtifactError as fault:
        raise SourceError(str(fault)) from fault


def _plain(given: Path, cache: Path, say: Say) -> tuple[Path, set[str]]:
    """A folder whose tensors, config.json and tokenizer belong together, and tensors that are no
    weights."""
    config, tokenizer = around.config_of(given, given), around.tokenizer_of(given, given)
    if config_json.FILE not in config:
        raise SourceError(f"{given} is not a model folder: it has no {config_json.FILE}")
    files.check_settings(config | tokenizer)
    try:
        weights = stored.of_headers(given, artifact.headers(given))
    except ArtifactError as fault:
        raise SourceError(str(fault)) from fault
    home = config[config_json.FILE].parent
    outline = door.outline(home, weights)
    found = door.admitted(weights, outline, given)
    shapes = {key: weights[tensor.given].shape for key, tensor in found.tensors.items()}
    voice = next((path.parent for name, path in tokenizer.items() if "/" not in name), given)
    changes = vocabulary.corrected(shapes, outline, voice, given, say) | _untied(
        found, outline, say
    )
    if config_json.read(home).get("architectures") is None:
        say(f"config.json names no architecture: {outline.config.architectures[0]} is taken")
        changes["architectures"] = outline.config.architectures
    elsewhere = {n: p for n, p in (config | tokenizer).items() if p != given / n}
    renamed = {t.name: weights[t.given] for t in found.tensors.values()} if found.renamed else None
    correction = Correction(changes, elsewhere, renamed)
    folder = corrected.folder(given, correction, cache, say)
    if found.untied and architecture.is_tied(architecture.config(folder)):
        raise SourceError(f"{given}: {outline.config.model_type} cannot have a head of its own")
    return folder, weights.keys() - {tensor.given for tensor in found.tensors.values()}


def _without(headers: Mapping[str, TensorHeader], names: Collection[str]) -> Headers:
    return {name: header for name, header in headers.items() if name not in names}


def _untied(found: Admitted, outline: Outline, say: Say) -> dict[str, Any]:
    """What config.json has to say where the files hold a head of its own, as transformers does."""
    for key in sorted(found.untied):
        name, of = (found.tensors[each].name for each in (key, outline.tied[key]))
        if key != outline.head:
            raise SourceError(f"{name} differs from {of}, and the model has one tensor for both")
        say(f"{name} differs from {of}, which config.json ties: both are kept, and not tied")
    return {"tie_word_embeddings": False} if found.untied else {}


def _folder(spec: str, cache: Path, say: Say) -> Path:
    path = paths.full(spec)
    beforehand.check_model(spec)
    if spec == DEMO and not path.exists():
        return gguf.folder(gguf.demo(), cache, say)
    if path.is_file():
        return gguf.folder(path, cache, say)
    if path.is_dir():
        files.check(path)
        return trainer.folder(path.resolve(), cache, say)
    say(f"looking for {spec} on the hub")
    try:
        with interrupt.at_once():  # it goes on with what it has by itself
            found = Path(snapshot_download(spec, allow_patterns=_HUB_FILES))
    except (OSError, HTTPError, HFValidationError) as fault:
        reason = str(fault).partition("\n")[0]
        raise SourceError(f"{spec} is no folder here, and the hub said: {reason}") from fault
    return trainer.folder(found, cache, say)


def _served_dtype(
    folder: Path, config: PretrainedConfig, headers: Mapping[str, TensorHeader]
) -> torch.dtype:
    """What config.json says, else the dtype that most weights are stored in."""
    stored = {name: _dtype(folder, name, header) for name, header in headers.items()}
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    sizes: Counter[torch.dtype] = Counter()
    for name, header in headers.items():
        sizes[stored[name]] += header.end - header.begin
    return sizes.most_common(1)[0][0]


def _dtype(folder: Path, name: str, header: TensorHeader) -> torch.dtype:
    if header.dtype not in _DTYPES:
        raise SourceError(
            f"{folder / header.file}: {name} is {header.dtype}: not full-precision weights"
        )
    return _DTYPES[header.dtype]
