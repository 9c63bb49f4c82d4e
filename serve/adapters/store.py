"""Adapters taken in: fetched, held against the base, kept under their digest, never changed.

The engine reads an adapter's files again whenever it has dropped it from memory, so it is given a
copy that nobody edits. A folder appears in the store by one rename or not at all, and leaves it
when no request, version or replica can need it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from quant import artifact
from quant.errors import AdapterError
from quant.lora import adapter, fitting, voice
from quant.lora.adapter import Adapter
from quant.lora.voice import Voice
from serve.adapters.sources import Sources
from serve.errors import AdapterRefused, StoreFailed

STAGING = ".partial-"
STATED = ("r", "lora_alpha", "target_modules")
UNNEEDED_S = 3600.0  # so long a folder stays after it was last taken in, needed or not


@dataclass(frozen=True, slots=True)
class Stored:
    """An adapter in the store; `folder` is named by its digest, `voice` is ready to be used."""

    digest: str
    folder: Path
    rank: int
    bytes: int
    voice: Voice = field(default_factory=Voice)


@dataclass(frozen=True, slots=True)
class Base:
    """What an adapter must fit: (out, in) by module, the largest rank, the weights' fingerprint.

    `tokens` are its own by text; None where it does not tell.
    """

    shapes: Mapping[str, tuple[int, int]]
    max_rank: int
    weights: str | None
    tokens: Mapping[str, int] | None = None


def base_of(folder: Path, max_rank: int) -> Base:
    """The base that a served folder is; only an artifact of ours knows its fingerprint."""
    manifest = artifact.read(folder)
    weights = manifest.parent.weights if manifest else None
    return Base(artifact.linear_shapes(folder), max_rank, weights, voice.vocabulary(folder))


@dataclass(frozen=True, slots=True)
class Store:
    """A folder of adapters by digest. Every method blocks: reads each byte once or twice."""

    root: Path
    base: Base
    sources: Sources
    _moving: Lock = field(default_factory=Lock)

    def take_in(self, source: str, expected: str | None = None) -> Stored:
        """Fetch `source`, validate it and keep it under its digest.

        AdapterRefused names the field that differs, `expected` digest included; StoreFailed says
        that the disk is full or not ours.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(dir=self.root, prefix=STAGING))
        except OSError as fault:
            raise StoreFailed(f"the adapter store {self.root}: {fault.strerror}") from fault
        try:
            self.sources.fetch(source, staging)
            found = self._read(staging, source)
            if expected is not None and found.digest != expected:
                raise AdapterRefused(
                    f"{source} holds {found.digest[:12]} now, not {expected[:12]}", param="digest"
                )
            own = self._fit(found, source)
            return self._keep(staging, found, own)
        except OSError as fault:
            raise StoreFailed(f"{source} could not be taken in: {fault}") from fault
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def find(self, digest: str) -> Stored | None:
        """What is kept under a digest, read and held against the base again.

        None when it is not there, or its bytes are no longer those of its digest.
        """
        folder = self.root / digest
        if not folder.is_dir():
            return None
        try:
            found = self._read(folder, digest[:12])
        except AdapterRefused:
            found = None
        if found is None or found.digest != digest:
            shutil.rmtree(folder)
            return None
        own = self._fit(found, digest[:12])
        os.utime(folder)
        return _stored(found, folder, own)

    def sweep(self, needed: Collection[str]) -> list[str]:
        """Remove what is not needed, and what a crash left behind; returns what went."""
        gone = []
        with self._moving:
            for folder in self.root.iterdir() if self.root.is_dir() else ():
                old = time.time() - folder.stat().st_mtime > UNNEEDED_S
                if old and folder.is_dir() and folder.name not in needed:
                    shutil.rmtree(folder, ignore_errors=True)
                    gone.append(folder.name)
        return gone

    def _read(self, folder: Path, source: str) -> Adapter:
        try:
            found = adapter.read(folder)
        except AdapterError as fault:
            raise _refused(fault, folder, source) from fault
        _check_stated(folder / adapter.CONFIG, source)
        return found

    def _fit(self, found: Adapter, source: str) -> Voice:
        base = self.base
        try:
            adapter.validate(
                found,
                base.shapes,
                max_rank=base.max_rank,
                base_weights_fingerprint=base.weights,
            )
            return fitting.fitted(found.voice, base.tokens, found.folder)
        except AdapterError as fault:
            raise _refused(fault, found.folder, source) from fault

    def _keep(self, staging: Path, found: Adapter, own: Voice) -> Stored:
        folder = self.root / found.digest
        _shorten(staging, found)
        for file in staging.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        with self._moving:
            try:
                os.rename(staging, folder)
            except OSError:
                if not folder.is_dir():
                    raise
            os.utime(folder)  # another intake may have been quicker; the digests say it is the same
        return _stored(found, folder, own)


def _shorten(staging: Path, found: Adapter) -> None:
    """A whole tokenizer was needed for the list of its added tokens, which is kept."""
    if (staging / voice.TOKENIZER).is_file():
        (staging / voice.ADDED).write_text(json.dumps(found.voice.added))
        (staging / voice.TOKENIZER).unlink()


def _check_stated(config: Path, source: str) -> None:
    """What PEFT and we have defaults or patience for, and vLLM has not."""
    try:
        stated = json.loads(config.read_text("utf-8"))
    except ValueError as fault:
        raise AdapterRefused(f"{source}/{config.name} is not UTF-8", param=config.name) from fault
    for name in STATED:
        if stated.get(name) is None:
            raise AdapterRefused(f"{source}/{config.name} does not state {name}", param=name)


def _stored(found: Adapter, folder: Path, own: Voice) -> Stored:
    size = sum(file.stat().st_size for file in folder.iterdir())
    return Stored(found.digest, folder, found.rank, size, own)


def _refused(fault: AdapterError, folder: Path, source: str) -> AdapterRefused:
    """In the caller's words: nobody knows our staging folder."""
    return AdapterRefused(str(fault).replace(str(folder.resolve()), source), param=fault.field)
