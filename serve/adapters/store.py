"""Adapters taken in: fetched, held against the base, kept under their digest, never changed.

The engine reads an adapter's files again whenever it has dropped it from memory, so it is given a
copy that nobody edits. A folder appears in the store by one rename or not at all, and leaves it
when no request, version or replica can need it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock

from quant import artifact
from quant.artifact import Manifest
from quant.durable import settle, settle_all
from quant.errors import AdapterError
from quant.lora import adapter, fitting, served, soft_prompt, voice
from quant.lora.adapter import Adapter
from quant.lora.folder import read_json
from quant.lora.soft_prompt import SoftPrompt
from quant.lora.voice import Voice
from serve.adapters.sources import Sources
from serve.errors import AdapterMissing, AdapterRefused, StoreFailed

logger = logging.getLogger(__name__)
Taken = Adapter | SoftPrompt
STAGING = ".partial-"
STATED = ("r", "lora_alpha", "target_modules")
LONGEST_REFUSAL = 2000  # characters
UNNEEDED_S = 3600.0  # so long a folder stays after it was last taken in, needed or not


Stamp = tuple[tuple[str, int, int, int], ...]  # name, inode, bytes and time of every file


@dataclass(frozen=True, slots=True)
class Stored:
    """An adapter in the store; `folder` is what the engine reads, `voice` is ready to be used.

    A LoRA has a rank, a soft prompt virtual tokens. What was fetched has a `source` to fetch the
    same again from.
    """

    digest: str
    folder: Path
    rank: int
    bytes: int
    voice: Voice = field(default_factory=Voice)
    virtual_tokens: int = 0
    source: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Base:
    """What an adapter must fit: (out, in) by module, the largest rank, the weights' fingerprint.

    `tokens` are its own by text, `width` that of its embeddings; None where it does not tell. Where
    it is an artifact of ours: its folder and manifest. `adapted` are the layers that the engine
    adds adapters to.
    """

    shapes: Mapping[str, tuple[int, int]]
    max_rank: int
    weights: str | None
    tokens: Mapping[str, int] | None = None
    width: int | None = None
    folder: Path | None = None
    manifest: Manifest | None = None
    adapted: tuple[str, ...] = served.LAYERS

    @property
    def artifact(self) -> str | None:
        return adapter.identity(self.manifest) if self.manifest else None

    def scales(self) -> Path | None:
        """The file by which a smoothed artifact's adapters are rewritten; AdapterError."""
        return adapter.units(self.folder, self.manifest) if self.folder else None


def base_of(folder: Path, max_rank: int) -> Base:
    """The base that a served folder is; only an artifact of ours knows its fingerprint."""
    manifest = artifact.read(folder)
    weights = manifest.parent.weights if manifest else None
    return Base(
        artifact.linear_shapes(folder),
        max_rank,
        weights,
        voice.vocabulary(folder),
        _width(folder),
        folder,
        manifest,
        served.targets(folder),
    )


def _width(folder: Path) -> int | None:
    config = json.loads((folder / "config.json").read_bytes())
    inner = config.get("text_config")
    width = (inner if isinstance(inner, dict) else config).get("hidden_size")
    return width if isinstance(width, int) else None


@dataclass(frozen=True, slots=True)
class Store:
    """A folder of adapters by digest. Every method blocks: reads each byte once or twice."""

    root: Path
    base: Base
    sources: Sources
    _moving: Lock = field(default_factory=Lock)
    _found: dict[str, tuple[Stamp, Stored]] = field(default_factory=dict)  # read whole, and right
    _lost: dict[str, str] = field(default_factory=dict)  # why a copy was thrown away

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
            again = self.sources.fetch(source, staging)
            found = _read(staging, source)
            if expected is not None and found.digest != expected:
                raise AdapterRefused(
                    f"{source} holds {found.digest[:12]} now, not {expected[:12]}", param="digest"
                )
            own = _fit(found, self.base, source)
            self._for_engine(found, source)
            return replace(self._stored(self._keep(staging, found), own, source), source=again)
        except AdapterMissing as fault:
            if expected not in self._lost:
                raise
            why = f"{fault}; the copy that was kept here was thrown away: {self._lost[expected]}"
            raise AdapterMissing(why, param=fault.param) from fault
        except OSError as fault:
            raise StoreFailed(f"{source} could not be taken in: {fault}") from fault
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def find(self, digest: str) -> Stored | None:
        """What is kept under a digest, read and held against the base again if a file has changed.

        None when it is not there, or its bytes are no longer those of its digest. AdapterRefused
        for one that does not fit (any more), StoreFailed for one that cannot be read.
        """
        folder = self.root / digest
        try:
            if not folder.is_dir():
                return None
            stored = self._read_again(folder, digest)
        except OSError as fault:
            raise StoreFailed(f"{digest[:12]} in the store {self.root}: {fault}") from fault
        if stored is not None:
            with suppress(OSError):  # another user's: then that user's server sweeps it
                os.utime(folder)
        return stored

    def _read_again(self, folder: Path, digest: str) -> Stored | None:
        stamp = _stamp(folder)
        known = self._found.get(digest)
        if known is not None and known[0] == stamp:
            return known[1]
        try:
            found = _read(folder, digest[:12])
            lost = "" if found.digest == digest else "its bytes have changed"
        except AdapterRefused as fault:
            lost = str(fault)
        if lost:
            logger.warning("the store throws away its copy of %s: %s", digest[:12], lost)
            self._lost[digest] = lost
            shutil.rmtree(folder)
            return None
        own = _fit(found, self.base, digest[:12])
        self._found[digest] = stamp, self._stored(found, own, digest[:12])
        return self._found[digest][1]

    def sweep(self, needed: Collection[str]) -> list[str]:
        """Remove what is not needed, and what a crash left behind; returns what went."""
        gone = []
        with self._moving:
            for folder in self.root.iterdir() if self.root.is_dir() else ():
                old = time.time() - folder.stat().st_mtime > UNNEEDED_S
                if old and folder.is_dir() and folder.name not in needed:
                    shutil.rmtree(folder, ignore_errors=True)
                    self._found.pop(folder.name, None)
                    gone.append(folder.name)
        return gone

    def _keep(self, staging: Path, found: Taken) -> Taken:
        folder = self.root / found.digest
        _shorten(staging, found)
        settle_all(staging)
        with self._moving:
            try:
                os.rename(staging, folder)
            except OSError:
                if not folder.is_dir():
                    raise
            settle(self.root)
            with suppress(OSError):  # another intake may have been quicker, and another user's
                os.utime(folder)
        return replace(found, folder=folder)

    def _stored(self, found: Taken, own: Voice, source: str) -> Stored:
        size = sum(file.stat().st_size for file in found.folder.iterdir() if file.is_file())
        rank, tokens = (0, found.tokens) if isinstance(found, SoftPrompt) else (found.rank, 0)
        return Stored(found.digest, self._for_engine(found, source), rank, size, own, tokens)

    def _for_engine(self, found: Taken, source: str) -> Path:
        """The adapter as it is, or for a smoothed artifact a copy in its units, in a folder of the
        adapter's own: replicas of other artifacts may share the store."""
        if isinstance(found, SoftPrompt):  # it enters where nothing is smoothed yet
            return found.folder
        scales = self.base.scales()
        if scales is None or found.artifact is not None:
            return found.folder
        folder = found.folder / f"for-{self.base.artifact}"
        if folder.is_dir():
            return folder
        from serve.adapters import units  # noqa: PLC0415 - torch, which no check before the start needs

        staging = Path(tempfile.mkdtemp(dir=found.folder, prefix=STAGING))
        try:
            units.write(found, scales, staging)
            settle_all(staging)
            os.rename(staging, folder)
            settle(found.folder)
        except AdapterError as fault:
            raise _refused(fault, found.folder, source) from fault
        except OSError:
            if not folder.is_dir():  # else another intake was quicker
                raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return folder


def _stamp(folder: Path) -> Stamp:
    """What changes with any of its files."""
    files = ((file, file.stat()) for file in folder.rglob("*") if file.is_file())
    return tuple(sorted((str(f), s.st_ino, s.st_size, s.st_mtime_ns) for f, s in files))


def check(folder: Path, base: Base) -> None:
    """AdapterRefused for a folder that would not be taken in."""
    _fit(_read(folder, str(folder)), base, str(folder))


def _read(folder: Path, source: str) -> Taken:
    try:
        if soft_prompt.is_one(folder):
            return soft_prompt.read(folder)
        found = adapter.read(folder)
    except AdapterError as fault:
        raise _refused(fault, folder, source) from fault
    _check_stated(folder / adapter.CONFIG, source)
    return found


def _fit(found: Taken, base: Base, source: str) -> Voice:
    try:
        if isinstance(found, SoftPrompt):
            soft_prompt.validate(found, base.width, base.weights)
        else:
            adapter.validate(
                found,
                base.shapes,
                max_rank=base.max_rank,
                base_weights_fingerprint=base.weights,
                base_artifact=base.artifact,
            )
            served.check(found.folder, found.pairs, base.adapted)
            base.scales()  # an old artifact does not tell them
        return fitting.fitted(found.voice, base.tokens, found.folder)
    except AdapterError as fault:
        raise _refused(fault, found.folder, source) from fault


def _shorten(staging: Path, found: Taken) -> None:
    """A whole tokenizer was needed for the list of its added tokens, which is kept."""
    if (staging / voice.TOKENIZER).is_file():
        (staging / voice.ADDED).write_text(json.dumps(found.voice.added))
        (staging / voice.TOKENIZER).unlink()


def _check_stated(config: Path, source: str) -> None:
    """What PEFT and we have defaults or patience for, and vLLM has not."""
    stated = read_json(config)
    for name in STATED:
        if stated.get(name) is None:
            raise AdapterRefused(f"{source}/{config.name} does not state {name}", param=name)


def _refused(fault: AdapterError, folder: Path, source: str) -> AdapterRefused:
    """In the caller's words: nobody knows our staging folder."""
    told = str(fault).replace(str(folder.resolve()), source)
    field = _printable(fault.field)[:200] if fault.field else None
    return AdapterRefused(_printable(told), param=field)


def _printable(text: str) -> str:
    """Names in a stranger's file may be of any length, and no text that an answer can carry."""
    cut = text if len(text) <= LONGEST_REFUSAL else f"{text[:LONGEST_REFUSAL]}..."
    return cut.encode("utf-8", "replace").decode().replace("\0", "?")
