"""How the parts of an artifact come to the disk: once, digested on the way, named at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quant import artifact, shards
from quant.artifact import FileDigest
from tests import durability, dying, tiny
from tests.test_pipeline import calibration_file, quantize


@pytest.mark.parametrize("joined", [shards.JOINED_BYTES, 0], ids=["joined", "in parts"])
def test_tensors_are_written_once_and_not_read_for_their_digest(
    joined: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small artifact is one file, for which its parts are written once more."""
    read: list[str] = []
    opens: list[str] = []
    taken: Any = artifact._digest

    def digest(path: Path) -> FileDigest:
        read.append(path.name)
        found: FileDigest = taken(path)
        return found

    parent, texts = tiny.model_folder(tmp_path / "parent"), calibration_file(tmp_path)
    monkeypatch.setattr(shards, "JOINED_BYTES", joined)
    dying.watched(
        tmp_path / ".out.partial", lambda event, path: opens.append(path) if event == "open" else 0
    )
    with monkeypatch.context() as patch:
        patch.setattr(artifact, "_digest", digest)
        for disk in durability.watched(patch, tmp_path):
            made = quantize(parent, tmp_path / "out", texts=texts, samples=4, length=32)
            assert "out" in disk.named and not disk.unsafe and not disk.unsettled
    assert "config.json" in read and not [name for name in read if name.endswith(".safetensors")]
    artifact.verify(made.folder, made.manifest)
    stored = [name for name in made.manifest.files if name.endswith(".safetensors")]
    assert len(stored) == (1 if joined else 3)
    parts = [shards.name(place, 3) for place in (1, 2, 3)]
    growing = [Path(path).name for path in opens if path.endswith(".safetensors.growing")]
    written = sorted(name for name in growing if name.startswith(".model"))
    assert written == sorted(f".{name}.growing" for name in {*parts, *stored})
