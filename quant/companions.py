"""The one list of files that belong to a model beside its configuration and its tensors.

Whoever copies, fetches, hashes or looks for such files asks here: an artifact, a merged model, a
trainer's checkpoint, the tokenizer's fingerprint. What is not on the list stays behind: what a
trainer keeps of its run, an optimizer's state, an index of other files' tensors. Standard library
only.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path, PurePath

TEMPLATES = "additional_chat_templates"  # where transformers keeps every template but the default
GENERATION = "generation_config.json"


def _in_any_case(pattern: str) -> str:
    return "".join(f"[{c.lower()}{c.upper()}]" if c.isalpha() else c for c in pattern)


# Shell patterns of paths inside the model's folder. `*` stops at a `/`.
VOCABULARIES = (
    "tokenizer.json", "tokenizer.[0-9]*.json", "tekken.json", "vocab.json", "vocab.txt", "*.model",
    "tokenizer.model.*", "*.spm", "*.tiktoken",
)  # fmt: skip
TOKENIZER = (
    *VOCABULARIES, "added_tokens.json", "emoji.json", "merges.txt", "special_tokens_map.json",
    "tokenizer_config.json", "*.jinja", "chat_template.json", f"{TEMPLATES}/*.jinja",
)  # fmt: skip
PROCESSORS = ("*processor_config.json", "audio_tokenizer_config.json")
LICENCES = tuple(
    map(_in_any_case, ("*license*", "*licence*", "*notice*", "*use_policy*", "copying*",
                       "licenses/*"))
)  # fmt: skip
ALL = (*TOKENIZER, *PROCESSORS, *LICENCES, GENERATION)
# Whatever they are called: what loaders take for weights or for code.
_LOADED = {".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pkl", ".pt", ".pth", ".py",
           ".safetensors", ".so"}  # fmt: skip


def found(folder: Path, patterns: Sequence[str] = ALL) -> list[str]:
    """The files of a folder that match, as paths in it with `/`, sorted; no hidden ones."""
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    plain = (p for p in paths if p.suffix.lower() not in _LOADED and not p.name.startswith("."))
    return sorted(path.relative_to(folder).as_posix() for path in plain)


def is_vocabulary(name: str) -> bool:
    return any(PurePath(name).match(pattern) for pattern in VOCABULARIES)


def copy(source: Path, target: Path, patterns: Sequence[str] = ALL) -> list[str]:
    """Copies what `found` tells over what stands in `target`; OSError where that cannot hold it.

    Chat templates replace those that stand there as a set: one that stayed would be chosen by name.
    """
    names = found(source, patterns)
    if any(name.endswith(".jinja") for name in names):
        shutil.rmtree(target / TEMPLATES, ignore_errors=True)
    for name in names:
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)
    return names
