"""A model's folder as it should have been: in the cache, with a config.json that tells the truth.

Where the weights are right it holds links to them; where their names are not, a copy of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from quant import artifact, companions, interrupt, staging
from quant.errors import SourceError
from quant.intake import cached, config_json
from quant.intake.stored import Weight
from quant.shards import Writer

FORMAT = 1  # raise it when the same folder would be corrected differently
MARGIN = 32 << 20  # bytes beside the tensors: tokenizer, configuration, headers
_CHUNK = 1 << 22

Weights = Mapping[str, Weight]


@dataclass(frozen=True, slots=True)
class Correction:
    """`config` is what config.json says otherwise, `files` what lies elsewhere, by name, `weights`
    all tensors by the names to have, where they have others."""

    config: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    weights: Weights | None = None

    def __bool__(self) -> bool:
        return bool(self.config or self.files or self.weights is not None)


def folder(given: Path, correction: Correction, cache: Path, say: Callable[[str], None]) -> Path:
    """`given` itself where nothing is to be corrected."""
    if not correction:
        return given
    files = _links(given)
    if any(companions.is_vocabulary(name) for name in correction.files):
        own = companions.found(given, companions.TOKENIZER)  # one tokenizer, not parts of two
        files = {name: path for name, path in files.items() if name not in own}
    files |= correction.files
    text = _config(files.pop(config_json.FILE).parent, correction.config)
    weights, identity = correction.weights, [f"{FORMAT}", str(given.resolve()), text]
    if weights is not None:
        say("the tensors have names that no loader knows: reading a copy under those it does")
        shards = {weight.path for weight in weights.values()}
        identity += [digest(sorted(shards)), *weights]
        files = {name: path for name, path in files.items() if path not in shards}
        files.pop(artifact.INDEX, None)
    identity += [f"{name} {path}" for name, path in sorted(files.items())]
    key = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:12]
    target = cache / "corrected" / f"{given.name}-{key}"
    if weights is not None and not target.is_dir():
        staging.check_space(target.parent, sum(w.bytes for w in weights.values()) + MARGIN)
    return cached.folder(target, partial(_make, files, text, weights or {}))


def write(made: Path, weights: Weights) -> None:
    """Safetensors of all `weights`, one in memory at a time. SourceError for what is not finite."""
    writer = Writer(made)
    for name, weight in weights.items():
        tensor = weight.read()
        assert tuple(tensor.shape) == weight.shape, name
        if not bool(tensor.isfinite().all()):
            raise SourceError(
                f"{weight.path}: {name} holds numbers that are not finite: take an earlier step"
            )
        writer.add(name, tensor)
    writer.close()


def digest(files: list[Path]) -> str:
    """sha256 over the names and the bytes of the files."""
    found = hashlib.sha256()
    for path in files:
        found.update(f"{path.parent.name}/{path.name}\n{path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                interrupt.check()
                found.update(chunk)
    return found.hexdigest()


def _links(given: Path) -> dict[str, Path]:
    home = given.resolve()
    names = {path.name for path in home.iterdir() if path.is_file()}.union(companions.found(home))
    return {name: home / name for name in sorted(names)}


def _config(home: Path, changes: Mapping[str, Any]) -> str:
    """What a model that sees says of its language model stands inside; who reads it, differs."""
    config = config_json.read(home)
    inner = config.get("text_config")
    for key, value in changes.items():
        if isinstance(inner, dict) and key in ("vocab_size", "tie_word_embeddings"):
            inner[key] = value
            if key == "vocab_size" and key not in config:
                continue
        config[key] = value
    return json.dumps(config, indent=2) + "\n"


def _make(files: Mapping[str, Path], text: str, weights: Weights, made: Path) -> None:
    if weights:
        write(made, weights)
    for name, path in files.items():
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).symlink_to(path)
    (made / config_json.FILE).write_text(text, "utf-8")
