"""Where an adapter's bytes come from: a folder, an object store, the hub.

Copies the few files an adapter consists of, and nothing else, into a folder of ours. Refuses
links, paths that leave the configured root, schemes that are not allowed, more bytes than allowed,
and pickles. What the files hold is the store's business.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar
from urllib.parse import unquote, urlsplit

import fsspec
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from quant.lora import adapter, voice
from serve.errors import AdapterMissing, AdapterRefused, SourcesBusy, SourceUnavailable

NEEDED = (adapter.CONFIG, adapter.WEIGHTS)
FILES = (adapter.CONFIG, adapter.LINEAGE, *voice.FILES, adapter.WEIGHTS)  # small ones first
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
HUB_ID = re.compile(r"(?:hf://)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?/?")
CHUNK = 4 << 20
FETCH_TIMEOUT_S = 600.0
FETCHES = 8  # from elsewhere at once; one that hangs keeps its thread, and there are no more
_FETCHING = ThreadPoolExecutor(FETCHES, "fetch")
# A file by name and its size, as far as it is known; None when it is not there.
Opener = Callable[[str], tuple[IO[bytes], int] | None]
T = TypeVar("T")
EXTRAS = {"s3": "s3", "gs": "gcs", "az": "azure", "abfs": "azure"}


@dataclass(frozen=True, slots=True)
class Sources:
    """What the operator allows; `root` None allows any absolute path of this machine."""

    root: Path | None = None
    schemes: tuple[str, ...] = ("file", "s3", "gs", "az")
    hub: bool = False
    max_bytes: int = 2 << 30

    def host(self, source: str) -> str:
        """Where a source lies: a bucket, the hub, or "" for this machine's own folders."""
        scheme, found, rest = source.partition("://")
        if not found:
            return "hf" if self._is_hub_id(source) else ""
        if scheme in ("file", "hf"):
            return "" if scheme == "file" else scheme
        return f"{scheme}://{rest.partition('/')[0]}"

    def fetch(self, source: str, into: Path) -> str:
        """Copy an adapter's files into the folder `into`. Blocking.

        Returns the source to fetch the same again from: of a hub id, its commit. AdapterRefused
        says what is not allowed or not there; SourceUnavailable that it could not be reached.
        """
        if "\0" in source or ".." in re.split(r"[/\\]", unquote(source)):
            raise AdapterRefused(f"source {source!r} may not contain '..'", param="source")
        scheme = source.partition("://")[0] if "://" in source else ""
        if scheme == "file":
            split = urlsplit(source)
            if split.netloc not in ("", "localhost"):
                raise AdapterRefused(f"{source} names another host", param="source")
            self._allow("file")
            self._from_folder(Path(unquote(split.path)), into)
        elif scheme and scheme != "hf":
            self._allow(scheme)
            if not urlsplit(source).netloc:
                raise AdapterRefused(f"source {source!r} names no bucket", param="source")
            _remote(lambda: self._from_store(source, into), source)
        elif scheme == "hf" or self._is_hub_id(source):
            return self._from_hub(source, into)
        else:
            self._allow("file")
            self._from_folder(Path(source), into)
        return source

    def _allow(self, scheme: str) -> None:
        if scheme not in self.schemes:
            allowed = ", ".join(self.schemes) or "none"
            raise AdapterRefused(
                f"source scheme {scheme!r} is not allowed here; allowed: {allowed} "
                "(QUANTSERVE_SOURCE_SCHEMES)",
                param="source",
            )

    def _is_hub_id(self, source: str) -> bool:
        """A folder under the root is meant before a hub id of the same name."""
        under_root = self.root is not None and (self.root / source).is_dir()
        return self.hub and not under_root and HUB_ID.fullmatch(source) is not None

    def _from_hub(self, source: str, into: Path) -> str:
        if not self.hub:
            raise AdapterRefused(
                "the hub is not allowed here: set QUANTSERVE_ALLOW_HUB", param="source"
            )
        named = HUB_ID.fullmatch(source)
        if named is None:
            raise AdapterRefused(
                f"{source!r} is not a hub id: OWNER/NAME[@REVISION]", param="source"
            )

        def work() -> str:
            # A branch may move between two files, and will before another replica fetches them.
            pinned = f"hf://{named['repo']}@{_commit(named['repo'], named['revision'])}"
            self._from_store(pinned, into, block_size=0)  # one request a file, not one a block
            return pinned

        return _remote(work, source)

    def _from_folder(self, path: Path, into: Path) -> None:
        folder = self._absolute(path).resolve()
        self._check_under_root(folder, path)
        try:
            at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as fault:
            reason = "does not exist" if fault.errno == errno.ENOENT else fault.strerror
            raise AdapterMissing(f"adapter folder {path} {reason}", param="folder") from fault

        def opened(name: str) -> tuple[IO[bytes], int] | None:
            return _plain_file(at, name, path)

        try:
            # Again, of what is open: a folder on the way may have become a link meanwhile.
            self._check_under_root(Path(os.readlink(f"/proc/self/fd/{at}")), path)
            self._copy(opened, into, str(path))
        finally:
            os.close(at)

    def _absolute(self, path: Path) -> Path:
        if path.is_absolute():
            return path
        if self.root is None:
            raise AdapterRefused(
                f"path {str(path)!r} is not absolute, and there is no adapter root it could "
                "be under (QUANTSERVE_ADAPTER_ROOT)",
                param="path",
            )
        return self.root / path

    def _check_under_root(self, folder: Path, path: Path) -> None:
        if self.root is not None and not folder.is_relative_to(self.root.resolve()):
            raise AdapterRefused(f"{path} is not under the adapter root {self.root}", param="path")

    def _from_store(self, url: str, into: Path, **reading: int) -> None:
        files, path = fsspec.url_to_fs(url)

        def opened(name: str) -> tuple[IO[bytes], int] | None:
            try:
                info = files.info(f"{path}/{name}")
            except FileNotFoundError:
                return None
            if info.get("type") == "directory":
                raise AdapterRefused(f"{url}/{name} is not a file", param=name)
            return files.open(f"{path}/{name}", "rb", **reading), int(info.get("size") or 0)

        self._copy(opened, into, url)

    def _copy(self, opened: Opener, into: Path, source: str) -> None:
        """The adapter's files, counted while they come: a store may not know their size."""
        left = self.max_bytes
        for name in FILES:
            found = opened(name)
            if found is None:
                if name in NEEDED:
                    raise _missing(opened, name, source)
                continue
            file, size = found
            most = voice.FILES.get(name, left)
            with file:
                taken = _take(file, size, into / name, min(most, left))
            if taken > left:
                raise AdapterRefused(
                    f"{source} is larger than {self.max_bytes} bytes "
                    "(QUANTSERVE_MAX_ADAPTER_BYTES)",
                    param=name,
                )
            if taken > most:
                raise AdapterRefused(f"{source}/{name} is larger than {most} bytes", param=name)
            left -= taken


def _plain_file(at: int, name: str, folder: Path) -> tuple[IO[bytes], int] | None:
    """A file of an opened folder and its size: no link, no device, nothing that could block."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    inner, _, leaf = name.rpartition("/")
    try:
        home = os.open(inner or ".", flags | os.O_DIRECTORY, dir_fd=at)
        try:
            file = os.fdopen(os.open(leaf, flags, dir_fd=home), "rb")
        finally:
            os.close(home)
    except FileNotFoundError:
        return None
    except OSError as fault:
        if fault.errno == errno.ELOOP:
            raise AdapterRefused(
                f"{folder / name} is a symbolic link; give a folder that holds the files "
                "themselves",
                param=name,
            ) from fault
        raise AdapterRefused(f"{folder / name}: {fault.strerror}", param=name) from fault
    about = os.fstat(file.fileno())
    if not stat.S_ISREG(about.st_mode):
        file.close()
        raise AdapterRefused(f"{folder / name} is not a plain file", param=name)
    return file, about.st_size


def _take(file: IO[bytes], size: int, target: Path, most: int) -> int:
    """The bytes copied, or announced: more than `most` when there are more."""
    taken, announced = 0, size
    target.parent.mkdir(exist_ok=True)
    with target.open("wb") as kept:
        while max(taken, announced) <= most and (chunk := file.read(CHUNK)):
            kept.write(chunk)
            taken += len(chunk)
    return max(taken, announced)


def _missing(opened: Opener, name: str, source: str) -> AdapterRefused:
    for pickle in PICKLES if name == adapter.WEIGHTS else ():
        found = opened(pickle)
        if found is not None:
            found[0].close()
            return AdapterRefused(
                f"{source}/{pickle} is a pickle, which can run code when it is read; save the "
                "adapter as safetensors",
                param="weights",
            )
    return AdapterMissing(f"{source}/{name} is missing", param=name)


def _commit(repo: str, revision: str | None) -> str:
    """The commit that a branch, tag or nothing names now; the errors are for `_remote`."""
    found = HfApi().model_info(repo, revision=revision).sha
    if found is None:
        raise AdapterMissing(f"the hub tells no commit of {repo}", param="source")
    return found


def _remote(work: Callable[[], T], source: str) -> T:
    """Each store has exceptions of its own: a value is easier to judge than `except`."""
    fetching = _FETCHING.submit(work)
    try:
        fault = fetching.exception(FETCH_TIMEOUT_S)
    except TimeoutError as late:
        if fetching.cancel():
            raise SourcesBusy(f"{source}: {FETCHES} other fetches have not ended") from late
        raise SourceUnavailable(
            f"{source} took over {FETCH_TIMEOUT_S:g} s", param="source"
        ) from late
    if fault is None:
        return fetching.result()
    if isinstance(fault, AdapterRefused):
        raise fault
    raise _told(fault, source) from fault


def _told(fault: BaseException, source: str) -> AdapterRefused | SourceUnavailable:
    """What a driver says, with what to do about it."""
    if isinstance(fault, RevisionNotFoundError):
        return AdapterMissing(f"the hub has {source}, but no such revision", param="source")
    if isinstance(fault, RepositoryNotFoundError):
        return AdapterMissing(
            f"the hub has no {source}, or not for everybody: check the name, or start the server "
            "with HF_TOKEN set to the token of somebody who may read it",
            param="source",
        )
    if isinstance(fault, ImportError):
        extra = EXTRAS.get(source.partition("://")[0])
        remedy = f": pip install 'quantserve[{extra}]'" if extra else ""
        return AdapterRefused(f"{source}: {fault}{remedy}", param="source")
    told = f"{type(fault).__name__}: {fault}"
    return SourceUnavailable(f"{source} could not be read: {told}", param="source")
