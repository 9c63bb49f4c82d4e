"""What belongs to a model and lies around its weights, and what a folder without weights is.

config.json and the tokenizer may stand in the folder, in its parent or in a folder beside. An
adapter, or a run with a folder for each checkpoint, is recognized and the way out named.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from quant import artifact, companions, foreign_json
from quant.intake import config_json

ADAPTER = "adapter_config.json"
_OF_MODEL = (config_json.FILE, companions.GENERATION, *companions.LICENCES)
_OF_TOKENIZER = (*companions.TOKENIZER, *companions.PROCESSORS)
_SUBFOLDERS = ("", "huggingface", "hf", "tokenizer")
_NUMBER = re.compile(r"\d+")
_MOST_TOLD = 4
_MOST_BYTES = 1 << 20  # of an adapter's configuration


def config_of(path: Path, found: Path) -> dict[str, Path]:
    """config.json and its kin by name, from the first place that has it; empty without one."""
    home = next((p for p in _places(path, found) if (p / config_json.FILE).is_file()), None)
    return _there(home, _OF_MODEL) if home is not None else {}


def tokenizer_of(path: Path, found: Path) -> dict[str, Path]:
    """The tokenizer's files by name, from the first place that has it; empty without one."""
    places = _places(path, found)
    home = next((p for p in places if companions.found(p, companions.VOCABULARIES)), None)
    return _there(home, _OF_TOKENIZER) if home is not None else {}


def instead(path: Path) -> str:
    """What a folder is that holds no weights, and what to give."""
    if (path / ADAPTER).is_file():
        return (
            f"{path} is an adapter, no model: give its base{_base(path)} as SOURCE, and this folder"
            " as --adapter"
        )
    if files := sorted(path.glob("*.gguf")):
        return f"{path} holds {_listed(files)}: give one file"
    inside = sorted(filter(Path.is_dir, path.iterdir()), key=_by_number)
    if models := [folder for folder in inside if (folder / config_json.FILE).is_file()]:
        return f"{path} holds no weights itself, but {_listed(models)}: give one of them"
    if adapters := [folder for folder in inside if (folder / ADAPTER).is_file()]:
        return (
            f"{path} holds no model, but the adapter {_listed(adapters)}: give its base"
            f"{_base(adapters[0])} as SOURCE, and {adapters[0]} as --adapter"
        )
    if not (path / config_json.FILE).is_file():
        return f"{path} is not a model folder: it has no {config_json.FILE}"
    return (
        f"{path} holds neither {artifact.SINGLE} nor {artifact.INDEX}, nor a trainer's checkpoint"
    )


def _places(path: Path, found: Path) -> Iterator[Path]:
    return (home / name for home in (path, found, path.parent) for name in _SUBFOLDERS)


def _there(home: Path, patterns: Sequence[str]) -> dict[str, Path]:
    return {name: home / name for name in companions.found(home, patterns)}


def _by_number(path: Path) -> tuple[int, str]:
    """checkpoint-9 before checkpoint-10."""
    number = _NUMBER.search(path.name)
    return (int(number[0][:18]) if number else -1, path.name)


def _listed(paths: list[Path]) -> str:
    told = ", ".join(path.name for path in paths[-_MOST_TOLD:])
    return told if len(paths) <= _MOST_TOLD else f"{len(paths)} of them, the last {told}"


def _base(folder: Path) -> str:
    """The base that an adapter names, in brackets."""
    path = folder / ADAPTER
    try:
        raw = path.read_bytes() if path.stat().st_size <= _MOST_BYTES else b""
        named = foreign_json.loads(raw).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return ""
    return f" ({named:.200})" if isinstance(named, str) and named.isprintable() else ""
