"""Models whose embedding has other rows than config.json says: tokens were added in training.

The rows are the truth when the tokenizer fits them: a folder in the cache then holds a corrected
config.json and links to the rest. Otherwise tokenizer and weights do not belong together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from transformers import PretrainedConfig

from quant import artifact, companions, tokens
from quant.errors import ArtifactError, SourceError
from quant.headers import TensorHeader
from quant.intake import cached
from quant.intake.architecture import is_tied

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_HEADS = ("lm_head.weight", "embed_out.weight")


def fitted(folder: Path, config: PretrainedConfig, cache: Path, say: Callable[[str], None]) -> Path:
    """`folder` itself when its numbers agree, else one where they do.

    SourceError states the rows, config.json's number and the tokenizer's.
    """
    try:
        headers = artifact.headers(folder)
    except ArtifactError as fault:
        raise SourceError(str(fault)) from fault
    rows, said = _rows(headers, _EMBEDDINGS), config.get_text_config().vocab_size
    if rows is None:
        return folder
    head = _rows(headers, _HEADS)
    if head not in (None, rows) and not is_tied(config):
        raise SourceError(f"{folder}: the embedding has {rows} rows, the output head {head}")
    if rows == said:
        return folder
    highest = max(tokens.load_tokenizer(folder).get_vocab().values(), default=-1) + 1
    if highest > rows:
        raise SourceError(
            f"{folder}: the embedding has {rows} rows, config.json says {said}, and the tokenizer"
            f" needs {highest}: put the tokenizer that the model was trained with there"
        )
    say(f"config.json says vocab_size {said}; the embedding has {rows} rows, which are taken")
    corrected = _corrected(folder / "config.json", rows)
    identity = hashlib.sha256(f"{folder.resolve()}\n{corrected}".encode()).hexdigest()[:12]
    target = cache / "resized" / f"{folder.name}-{rows}-{identity}"
    return cached.folder(target, lambda made: _linked(folder, made, corrected))


def _rows(headers: Mapping[str, TensorHeader], names: tuple[str, ...]) -> int | None:
    """Rows of the one tensor with one of these names; None where there is none, or several."""
    found = [
        header.shape[0]
        for name, header in headers.items()
        if len(header.shape) == 2 and f".{name}".endswith(tuple(f".{end}" for end in names))
    ]
    return found[0] if len(found) == 1 else None


def _corrected(path: Path, rows: int) -> str:
    config = json.loads(path.read_bytes())
    nested = config.get("text_config")
    inner = isinstance(nested, dict) and "vocab_size" not in config
    (nested if inner else config)["vocab_size"] = rows
    return json.dumps(config, indent=2) + "\n"


def _linked(folder: Path, made: Path, corrected: str) -> None:
    files = {path.name for path in folder.iterdir() if path.is_file()} - {"config.json"}
    for name in sorted(files.union(companions.found(folder))):
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).symlink_to(folder.resolve() / name)
    (made / "config.json").write_text(corrected, "utf-8")
