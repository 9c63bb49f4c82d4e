"""What a command line names, looked at before torch is imported: models, targets, devices, files.

A mistake that needs no model to be seen is told at once. What comes behind the imports looks
again, since libraries are called without a command line too; it uses the same functions.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from quant import artifact, paths, staging, textfile
from quant.artifact import Manifest
from quant.errors import ArtifactError, RecipeError, SourceError
from quant.lora import adapter as lora

DEMO = "demo"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """What one command line names. None is what an option is when it was not given."""

    artifacts: Sequence[Path | None] = ()  # what `quantize` wrote
    models: Sequence[str | None] = ()  # as `quantize` takes them
    adapters: Sequence[Path | None] = ()
    texts: Sequence[Path | None] = ()
    targets: Sequence[Path | None] = ()
    force: bool = False
    device: str = "cpu"

    def check(self) -> None:
        """A QuantError for the first that is not there, or is in the way."""
        for spec in filter(None, self.models):
            check_model(spec)
        for target in filter(None, self.targets):
            staging.check_target(paths.full(target).absolute(), force=self.force)
        check_device(self.device)
        for folder in filter(None, self.artifacts):
            artifact_of(paths.full(folder))
        for folder in filter(None, self.adapters):
            lora.config_of(paths.full(folder))
        for file in filter(None, self.texts):
            textfile.check(file)


def check_model(spec: str) -> None:
    """SourceError unless `spec` is a folder, a GGUF file, `demo`, or could be a hub id."""
    path = paths.full(spec)
    if spec == DEMO or path.is_dir() or (path.is_file() and path.suffix.lower() == ".gguf"):
        return
    if path.exists():
        raise SourceError(
            f"{path} is neither a model folder nor a .gguf file: give the folder that it lies in"
        )
    if not _HUB_ID.fullmatch(spec):
        raise SourceError(f"{path} does not exist")


def check_device(names: str) -> None:
    """RecipeError for a GPU where torch was built without support for any."""
    if "cuda" in names and not _has_cuda():
        raise RecipeError(
            f"device {names!r}: the torch installed here is built without CUDA; leave --device out"
        )


def check_answers(calibration: Path | None) -> None:
    """RecipeError where answers are to be counted, of no file."""
    if calibration is None:
        raise RecipeError(
            "assistant-only counts the answers in a file of chats; give one as --calibration"
        )


def check_folder(folder: Path) -> None:
    """ArtifactError unless there is a folder."""
    if not folder.is_dir():
        raise ArtifactError(
            f"{folder} {'is not a folder' if folder.exists() else 'does not exist'}"
        )


def artifact_of(folder: Path) -> Manifest:
    """The manifest of an artifact; ArtifactError where the folder is none, or not there."""
    check_folder(folder)
    manifest = artifact.read(folder)
    if manifest is None:
        raise ArtifactError(f"{folder} has no {artifact.MANIFEST}: it is not an artifact of ours")
    return manifest


def _has_cuda() -> bool:
    """Whether torch was built for it, by the text of its version.py: to import it takes seconds."""
    found = find_spec("torch")
    if found is None or found.origin is None:
        return True  # it is missing altogether, which whoever imports it says
    for node in ast.parse(Path(found.origin).with_name("version.py").read_text()).body:
        named = isinstance(node, ast.AnnAssign) and ast.unparse(node.target) in ("cuda", "hip")
        if named and ast.unparse(node).rpartition(" = ")[2] != "None":
            return True
    return False
