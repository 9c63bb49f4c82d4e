"""The one door for pickles: torch's checkpoints read without running anything they name.

A pickle may ask for any function of any module and have it called. This reader resolves names by
the literal tables below and imports nothing: tensors become `Stored`, containers plain ones, known
classes of trainers inert stand-ins that hold their fields. Any other name is a SourceError.

What is read costs time and memory in proportion to the file, here and with whoever walks it later:
a few bytes can name a value that holds itself twice over, level by level. Refuses keys that are no
plain values, nesting that no trainer needs, and structures of far more parts than the file has
bytes.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch

from quant.errors import SourceError, brief
from quant.intake.archive import Archive, Storage, Window
from quant.intake.stored import Stored

MOST_DEPTH = 64  # containers in one another
_SPARE, _SHARED = 1 << 20, 16  # parts: so many, and so many for each byte of the file
_LONGEST_KEY = 64  # of plain values in a tuple
_KEYS = (str, int, float, bytes, torch.dtype, type(None))
_HOLDING = (dict, list, tuple, set, frozenset)

# Opcodes that hash, and where the keys lie on the stack: SETITEM; SETITEMS and DICT; ADDITEMS and
# FROZENSET.
_HASHING = {
    ord("s"): slice(-2, -1), ord("u"): slice(None, None, 2), ord("d"): slice(None, None, 2),
    0x90: slice(None), 0x91: slice(None),
}  # fmt: skip
_LONG4 = 0x8B  # an integer of any length

# What the standard library lets fly over bytes that are no pickle, or one built to hurt.
_UNREADABLE = (
    pickle.UnpicklingError, EOFError, AttributeError, ImportError, LookupError, TypeError,
    ValueError, OverflowError, RecursionError, MemoryError, struct.error, NotImplementedError,
)  # fmt: skip


def load(path: Path, begin: int = 0, length: int | None = None) -> Any:
    """What torch.save wrote to `path`, or to the bytes [begin, begin + length) of it.

    Tensors are `Stored`, dictionaries `Mapped`. SourceError names what is forbidden or damaged.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, io.SEEK_END)
            window = Window(file, begin, size - begin if length is None else length)
            if begin + window.length > size:
                raise SourceError(f"{path} is truncated: {size} bytes, and a tensor ends later")
            archive = Archive(path, window)
            return _read(path, io.BytesIO(archive.pickled()), archive)
    except OSError as fault:
        raise SourceError(f"{path} cannot be read: {fault.strerror or fault}") from fault


def load_bare(path: Path) -> Any:
    """A pickle that is a file of its own, without tensors: `.metadata` of a checkpoint."""
    try:
        with path.open("rb") as file:
            return _read(path, file, None)
    except OSError as fault:
        raise SourceError(f"{path} cannot be read: {fault.strerror}") from fault


class Mapped(dict[Any, Any]):
    """An OrderedDict or defaultdict; attributes that a pickle sets on it are left out."""

    def __init__(self, *given: Any) -> None:
        # A defaultdict's first argument is its factory; an old OrderedDict's, a list of pairs.
        super().__init__(given[0] if given and isinstance(given[0], list | dict) else ())

    def __setstate__(self, _state: object) -> None:
        """Torch keeps module versions there."""


class Inert:
    """Stands for an object of a class that is known by name and never imported."""

    name = ""

    def __new__(cls, *arguments: Any, **named: Any) -> Inert:
        made = super().__new__(cls)
        made.arguments = arguments
        made.state = named
        return made

    def __init__(self, *_arguments: Any, **_named: Any) -> None:
        self.arguments: tuple[Any, ...]
        self.state: Any

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Content of a container class, which nobody reads."""

    def append(self, value: Any) -> None:
        """As above."""

    def extend(self, values: Any) -> None:
        """As above."""

    def fields(self) -> list[Any]:
        """What it was made with, and what was set on it."""
        return [*self.arguments, self.state]

    def get(self, field: str, default: Any = None) -> Any:
        """A field of the object, whether it lay in its dictionary or in its slots."""
        parts = self.state if isinstance(self.state, tuple) else (self.state,)
        for part in parts:
            if isinstance(part, dict) and field in part:
                return part[field]
        return default


def _read(path: Path, file: BinaryIO, archive: Archive | None) -> Any:
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    most = _SPARE + _SHARED * size
    try:
        found = _Reader(path, file, archive, most).load()
        _check_extent(found, most)
    except _UNREADABLE as fault:
        kind, words = type(fault).__name__, " ".join(map(str, fault.args))
        raise SourceError(f"{path} cannot be read as a checkpoint: {kind}: {words:.200}") from fault
    return found


def _check_extent(found: Any, most: int) -> None:
    """UnpicklingError where a walk over `found`, or over what a stand-in hides in it, would meet
    more than `most` parts, each counted as often as it is met, or go too deep, or never end."""
    extents: dict[int, tuple[int, int]] = {}  # of each container by id: parts, depth
    opened: set[int] = set()
    roots = [found]
    while roots:
        path = [roots.pop()]
        while path:
            value = path[-1]
            parts = _parts(value) if id(value) not in extents else []
            inner = [part for part in parts if isinstance(part, _HOLDING)]
            todo = [part for part in inner if id(part) not in extents]
            if todo:
                opened.add(id(value))
                if any(id(part) in opened for part in todo):
                    raise pickle.UnpicklingError("it holds a container that contains itself")
                path += todo
                continue
            path.pop()
            if id(value) in extents:
                continue
            roots += [its for part in parts if isinstance(part, Inert) for its in part.fields()]
            known = [extents[id(part)] for part in inner]
            extent = len(parts) + sum(count for count, _ in known)
            depth = 1 + max((deep for _, deep in known), default=0)
            if extent > most or depth > MOST_DEPTH:
                raise pickle.UnpicklingError(
                    f"it holds containers {MOST_DEPTH} deep, or of more than {most} parts"
                )
            extents[id(value)] = extent, depth


def _parts(value: Any) -> list[Any]:
    """What a container holds; what a stand-in does, which nobody walks through."""
    if isinstance(value, Inert):
        return value.fields()
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return list(value) if isinstance(value, _HOLDING) else []


def _check_keys(keys: Iterable[Any]) -> None:
    """UnpicklingError for keys whose hash could take for ever: that of a tuple that holds one
    twice, which does the same, is not remembered."""
    for key in keys:
        flat = key if isinstance(key, tuple) and len(key) <= _LONGEST_KEY else (key,)
        if not all(isinstance(part, (*_KEYS, Inert)) for part in flat):
            raise pickle.UnpicklingError(f"a key is no plain value: {brief(key)}")


def _guarded(code: int, step: Callable[[Any], None]) -> Callable[[Any], None]:
    """The step of an opcode, its keys looked at before it hashes them."""
    keys = _HASHING.get(code)

    def guarded(reader: Any) -> None:
        if keys is None:
            raise pickle.UnpicklingError("it holds an integer of more than 255 bytes")
        _check_keys(reader.stack[keys])
        step(reader)

    return guarded if keys is not None or code == _LONG4 else step


class _Builder:
    """What a file may call. It has no attributes that the file could set."""

    __slots__ = ("_build",)

    def __init__(self, build: Callable[..., Any]) -> None:
        self._build = build

    def __call__(self, *arguments: Any) -> Any:
        return self._build(*arguments)

    def __setstate__(self, _state: object) -> None:
        raise TypeError("a function has no state")


class _Reader(pickle._Unpickler):
    """Resolves names by table and storages by record; `find_class` never imports.

    Python's own implementation: the one in C makes its memo as long as the largest number that a
    file gives an object, so that five bytes ask for 64 GB and the process is killed.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        code: _guarded(code, step) for code, step in dict(pickle._Unpickler.dispatch).items()
    }

    def __init__(self, path: Path, file: BinaryIO, archive: Archive | None, most: int) -> None:
        super().__init__(file)
        self._path, self._archive = path, archive
        self._left = most  # parts that containers may still be made of out of others
        self._known: dict[str, Any] = {
            **_PLAIN,
            **{name: _Builder(partial(build, path)) for name, build in _TENSORS.items()},
            **{name: _Builder(partial(self._copy, kind)) for name, kind in _CONTAINERS.items()},
        }

    def find_class(self, module: str, name: str) -> Any:
        full = f"{_RENAMED.get(module, module)}.{name}"
        if full not in self._known:
            if full not in _INERT and not full.startswith(_INERT_PACKAGES):
                raise SourceError(
                    f"{self._path} asks for {full:.200}, which no checkpoint of weights needs;"
                    " nothing of it was run. If you trust the file, save its weights again as"
                    " safetensors"
                )
            self._known[full] = type("Inert", (Inert,), {"name": full})
        return self._known[full]

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _device, count = pid
        known = kind == "storage" and isinstance(dtype, torch.dtype)
        if self._archive is None or not known or not isinstance(key, str | int):
            raise pickle.UnpicklingError(f"unknown reference {brief(pid)}")
        return self._archive.storage(str(key), dtype, int(count))

    def _copy(self, kind: Callable[..., Any], *arguments: Any) -> Any:
        """A container of what is in another. One that is copied over and over is refused: each
        part of it has its bytes in the file but once."""
        for given in arguments:
            if isinstance(given, _HOLDING):
                self._left -= len(given)
                pairs = kind is Mapped and isinstance(given, list)
                _check_keys(pair[0] for pair in given if pair) if pairs else None
                _check_keys(given) if kind is set else None
        if self._left < 0:
            raise pickle.UnpicklingError("it copies containers over and over")
        return kind(*arguments)


def _sizes(numbers: Any) -> tuple[int, ...]:
    """Of a tensor's dimensions, few and within 64 bits."""
    found = tuple(map(int, numbers)) if len(numbers) <= MOST_DEPTH else ()
    if len(found) != len(numbers) or max(map(abs, found), default=0) >= 1 << 63:
        raise ValueError(f"no tensor has the sizes {brief(numbers)}")
    return found


def _view(path: Path, storage: Storage, offset: int, shape: tuple[int, ...], *rest: Any) -> Stored:
    """_rebuild_tensor_v2(storage, offset, size, stride, ...)."""
    within = (int(offset), _sizes(shape), _sizes(rest[0]))
    return Stored(path, storage.begin, storage.held, storage.dtype, *within)


def _typed_view(
    path: Path, storage: Storage, offset: int, shape: tuple[int, ...], *rest: Any
) -> Stored:
    """_rebuild_tensor_v3(storage, offset, size, stride, grad, hooks, dtype): an untyped storage."""
    dtype = rest[3]
    held = storage.held * storage.dtype.itemsize // dtype.itemsize
    return _view(path, Storage(storage.begin, held, dtype), offset, shape, *rest)


def _inner(_path: Path, tensor: Stored, *_rest: Any) -> Stored:
    """A parameter is its tensor."""
    if not isinstance(tensor, Stored):
        raise TypeError("a parameter without a tensor")
    return tensor


def _of_type(
    _path: Path, build: Callable[..., Stored], _kind: object, arguments: tuple[Any, ...], *_: Any
) -> Stored:
    """_rebuild_from_type_v2(build, class, arguments, state): attributes set on it are left out."""
    made = build(*arguments)
    if not isinstance(made, Stored):
        raise TypeError("a tensor's subclass without a tensor")
    return made


_TENSORS: dict[str, Callable[..., Stored]] = {
    "torch._utils._rebuild_tensor": _view,
    "torch._utils._rebuild_tensor_v2": _view,
    "torch._utils._rebuild_tensor_v3": _typed_view,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch._utils._rebuild_parameter": _inner,
    "torch._utils._rebuild_parameter_with_state": _inner,
}
_DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float32", "float64", "float16", "bfloat16", "int8", "int16", "int32", "int64", "uint8",
        "uint16", "uint32", "uint64", "bool", "complex64", "complex128", "float8_e4m3fn",
        "float8_e5m2",
    )
}  # fmt: skip
_STORAGES = {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16,
    "BFloat16": torch.bfloat16, "Char": torch.int8, "Short": torch.int16, "Int": torch.int32,
    "Long": torch.int64, "Byte": torch.uint8, "Bool": torch.bool,
}  # fmt: skip
_CONTAINERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": Mapped,
    "collections.defaultdict": Mapped,
    "builtins.set": set,
    "torch.Size": tuple,
}
_PLAIN: dict[str, Any] = {
    "torch.storage.UntypedStorage": torch.uint8,
    **{f"torch.{name}": dtype for name, dtype in _DTYPES.items()},
    **{f"torch.{name}Storage": dtype for name, dtype in _STORAGES.items()},
}
_RENAMED = {"__builtin__": "builtins"}  # as pickles of torch's protocol, 2, call it
_INERT = {
    "argparse.Namespace", "types.SimpleNamespace", "pathlib.PosixPath", "pathlib.Path",
    "pathlib._local.PosixPath", "signal.Signals", "_io.BytesIO", "_codecs.encode",
    "builtins.bytearray", "builtins.slice", "builtins.list", "builtins.dict", "builtins.int",
    "torch.device", "torch.serialization._get_layout", "torch.Tensor",
    "torch.nn.parameter.Parameter", "torch.nn.functional.silu", "torch.nn.functional.gelu",
    "torch._C._nn.silu", "torch._C._nn.gelu", "numpy.ndarray", "numpy.dtype",
    "numpy.core.multiarray._reconstruct", "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct", "numpy._core.multiarray.scalar",
}  # fmt: skip
# Whole packages: their classes come and go with versions, and a stand-in does nothing.
_INERT_PACKAGES = (
    "deepspeed.", "megatron.", "transformer_engine.", "apex.", "torch.distributed.checkpoint.",
)  # fmt: skip
