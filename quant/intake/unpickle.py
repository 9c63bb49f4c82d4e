"""The one door for pickles: torch's checkpoints read without running anything they name.

A pickle may ask for any function of any module and have it called. This reader resolves names by
the literal tables below and imports nothing: tensors become `Stored`, containers plain ones, known
classes of trainers inert stand-ins that hold their fields. Any other name is a SourceError.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from quant.errors import SourceError
from quant.intake.archive import Archive, Storage, Window
from quant.intake.stored import Stored

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

    def get(self, field: str, default: Any = None) -> Any:
        """A field of the object, whether it lay in its dictionary or in its slots."""
        parts = self.state if isinstance(self.state, tuple) else (self.state,)
        for part in parts:
            if isinstance(part, dict) and field in part:
                return part[field]
        return default


def _read(path: Path, file: BinaryIO, archive: Archive | None) -> Any:
    try:
        return _Reader(path, file, archive).load()
    except _UNREADABLE as fault:
        raise SourceError(f"{path} cannot be read as a checkpoint: {fault!r:.200}") from fault


class _Reader(pickle._Unpickler):
    """Resolves names by table and storages by record; `find_class` never imports.

    Python's own implementation: the one in C makes its memo as long as the largest number that a
    file gives an object, so that five bytes ask for 64 GB and the process is killed.
    """

    def __init__(self, path: Path, file: BinaryIO, archive: Archive | None) -> None:
        super().__init__(file)
        self._path, self._archive = path, archive
        self._built = {name: self._tensor(build) for name, build in _TENSORS.items()}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{_RENAMED.get(module, module)}.{name}"
        if full in self._built:
            return self._built[full]
        if full in _PLAIN:
            return _PLAIN[full]
        if full in _INERT or full.startswith(_INERT_PACKAGES):
            return type("Inert", (Inert,), {"name": full})
        raise SourceError(
            f"{self._path} asks for {full}, which no checkpoint of weights needs; nothing of it was"
            " run. If you trust the file, save its weights again as safetensors"
        )

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _device, count = pid
        if self._archive is None or kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"unknown reference {pid!r:.80}")
        return self._archive.storage(str(key), dtype, int(count))

    def _tensor(self, build: Callable[..., Stored]) -> Callable[..., Stored]:
        return lambda *arguments: build(self._path, *arguments)


def _view(path: Path, storage: Storage, offset: int, shape: tuple[int, ...], *rest: Any) -> Stored:
    """_rebuild_tensor_v2(storage, offset, size, stride, ...)."""
    stride = tuple(map(int, rest[0]))
    shape = tuple(map(int, shape))
    return Stored(path, storage.begin, storage.held, storage.dtype, int(offset), shape, stride)


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
_PLAIN: dict[str, Any] = {
    "collections.OrderedDict": Mapped,
    "collections.defaultdict": Mapped,
    "builtins.set": set,
    "torch.Size": tuple,
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
