"""The sealed folder: its manifest, its digests, and what its safetensors headers say.

Standard library and pydantic only, so that a server can read an artifact without torch. Reads
headers, never tensors; trusts neither header sizes nor file names it finds.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from quant import companions, durable, finite, foreign_json, formats, interrupt
from quant.errors import ArtifactError
from quant.formats import Format
from quant.headers import Headers, TensorHeader, read_headers
from quant.proof.evidence import Fidelity, FirstAnswers

MANIFEST = "quantserve.json"
CARD = "README.md"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_CHUNK = 1 << 22
_LONGEST_NAME = 256  # of a file
_MOST_BYTES = 256 << 20  # of a manifest; a line for each of a million experts' layers

TrainingBase = Literal["stored", "nf4", "nf4-double", "residual"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Fingerprint(_Frozen):
    """Identity of a parent model: its tensors before any merge, and its tokenizer files."""

    weights: Sha256
    tokenizer: Sha256


class MergedAdapter(_Frozen):
    name: str
    digest: Sha256
    rank: int
    modules: int
    initial: Sha256 | None = None  # of the saved start that was undone, as PiSSA's


class LayerReport(_Frozen):
    """Loss of the solved codes, and of plain rounding on the same Hessian in the same units.

    Both are against the target that the layer was solved for, which is the parent's weight moved
    by what its inputs and the stream have lost: rounding the parent's own weight loses more than
    `rounding_loss`, so that their ratio understates what the solver gains.
    `bits` of a weight, 16 for a layer left in full precision; None where the manifest has them.
    `routed` calibration tokens were given to the expert that the layer is of; None of other layers.
    """

    name: str
    loss: float
    rounding_loss: float
    damping: float
    bits: Literal[4, 8, 16] | None = None
    group: int = -1
    routed: int | None = None


class CalibrationReport(_Frozen):
    """What calibrated the model: `samples` rows holding `tokens` that count in all.

    `widest_input` is that of the layers, in_features; None in older manifests.
    """

    digest: Sha256
    origin: Literal["file", "self-generated"]
    samples: int
    tokens: int
    widest_input: int | None = None


class FileDigest(_Frozen):
    sha256: Sha256
    bytes: int


class Manifest(_Frozen):
    """What an artifact is, where it came from and what it cost; sizes in bytes, times in s.

    On disk, one of format 2 carries a digest of itself beside these fields; format 1 had none.
    """

    format: Literal[1, 2] = 2
    created: datetime
    quantserve: str
    architecture: str
    source: str
    parent: Fingerprint
    adapters: tuple[MergedAdapter, ...] = ()
    training_base: TrainingBase = "stored"
    recipe: dict[str, JsonValue]
    scheme: Literal["w4a16", "w8a16", "w8a8"]
    bits: int
    group_size: int  # both are most layers'
    bits_per_weight: float | None = None
    calibration: CalibrationReport
    layers: tuple[LayerReport, ...]
    bytes_before: int
    bytes_after: int
    seconds: float
    versions: dict[str, str]
    files: dict[str, FileDigest] = {}
    first_answers: FirstAnswers | None = None
    fidelity: Fidelity | None = None


def read(folder: Path) -> Manifest | None:
    """The manifest of an artifact; None for a folder without one.

    ArtifactError where it is broken, or not what was written when the folder was sealed.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        raw = foreign_json.loads(_bounded(path))
        told = raw.pop("digest", None) if isinstance(raw, dict) else None
        manifest = Manifest.model_validate(raw)
    except ValidationError as fault:
        first = fault.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ArtifactError(f"{path} is not a valid manifest: {place}: {first['msg']}") from fault
    except ValueError as fault:
        raise ArtifactError(f"{path} is not a valid manifest: the file: {fault}") from fault
    except OSError as fault:
        raise ArtifactError(f"{path} cannot be read: {fault.strerror}") from fault
    if told != (None if manifest.format == 1 else _of_manifest(raw)):
        raise ArtifactError(
            f"{path} was altered after it was sealed: its content has another digest than it says;"
            " put back the file that `quantize` or `compare` wrote, or quantize again"
        )
    return manifest


def _bounded(path: Path) -> bytes:
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise ValueError(f"it has {size} bytes, at most {_MOST_BYTES} are expected")
    return path.read_bytes()


def seal(folder: Path, manifest: Manifest, known: Mapping[str, FileDigest] = {}) -> Manifest:
    """Writes the manifest, with a digest of every file in the folder, and returns it.

    `known` are digests of files that were taken while these were written. The last step of making
    an artifact: the manifest is flushed to disk and renamed into place.
    """
    names = _file_names(folder)
    files = {name: known[name] for name in names if name in known}
    return amend(folder, manifest.model_copy(update={"files": files}), set(names) - set(files))


def amend(folder: Path, manifest: Manifest, altered: Iterable[str]) -> Manifest:
    """As `seal`, with new digests of the files in `altered` alone."""
    fresh = {name: _digest(folder / name) for name in altered}
    files = dict(sorted((manifest.files | fresh).items()))
    sealed = manifest.model_copy(update={"files": files})
    content = json.loads(sealed.model_dump_json())
    if sealed.format > 1:
        content["digest"] = _of_manifest(content)
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    durable.replace(folder / MANIFEST, text)
    return sealed


def verify(
    folder: Path, manifest: Manifest, *, tensors: bool = True, but: Collection[str] = ()
) -> None:
    """ArtifactError naming the first file that is missing, altered, or that nobody sealed.

    Without `tensors` the safetensors files are held to their sizes alone, and nearly nothing is
    read. The files in `but` may be what they like, or not there.
    """
    there = set(_file_names(folder))
    for name, expected in manifest.files.items():
        if name not in but:
            _check(folder / name, expected, there=name in there, tensors=tensors)
    # Loaders read what they find: shards, templates, an adapter, a tokenizer's other spelling.
    for name in sorted(there.difference(manifest.files, but)):
        raise ArtifactError(
            f"{folder / name} is not part of the sealed artifact, and a loader may read it: move it"
            " out of the folder"
        )


def _check(path: Path, expected: FileDigest, *, there: bool, tensors: bool) -> None:
    if not there or not path.is_file():
        raise ArtifactError(f"{path} is missing; the manifest lists it")
    if path.stat().st_size != expected.bytes:
        raise ArtifactError(
            f"{path} has {path.stat().st_size} bytes, the manifest says {expected.bytes}"
        )
    try:
        same = not (tensors or path.suffix != ".safetensors") or _digest(path) == expected
    except OSError as fault:
        raise ArtifactError(f"{path} cannot be read: {fault.strerror}") from fault
    if not same:
        raise ArtifactError(f"{path} differs from what was sealed (sha256)")


def headers(folder: Path) -> dict[str, TensorHeader]:
    """Every tensor of a model folder by name, single file or indexed shards, sorted by name.

    ArtifactError names the file that is missing, truncated or corrupt.
    """
    found: dict[str, TensorHeader] = {}
    for shard in _shards(folder):
        for name, header in read_headers(folder / shard).items():
            if name in found:
                raise ArtifactError(f"{folder}: {name} is in {found[name].file} and in {shard}")
            found[name] = header
    _check_index(folder, found)
    if not found:
        raise ArtifactError(f"{folder} holds no tensors")
    return dict(sorted(found.items()))


def linear_shapes(folder: Path, found: Headers | None = None) -> dict[str, tuple[int, int]]:
    """Module -> (out_features, in_features) of every two-dimensional weight, or of those `found`.

    Plain and int-quantized weights as stored, GPTQ's `qweight` [in * bits / 32, out] unpacked by
    its bits in config.json. Embeddings are among them: headers alone cannot tell; nor can they
    tell a GPT-2 Conv1D, stored (in, out).
    """
    shapes: dict[str, tuple[int, int]] = {}
    section: dict[str, Any] = {}
    for name, header in (headers(folder) if found is None else found).items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and len(header.shape) == 2:
            shapes[module] = (header.shape[0], header.shape[1])
        elif kind == "qweight" and len(header.shape) == 2:
            section = section or quantization_config(folder) or {}
            bits = format_of(folder, section, module).bits
            shapes[module] = (header.shape[1], header.shape[0] * 32 // bits)
    return shapes


def weights_fingerprint(folder: Path, found: Headers | None = None) -> str:
    """sha256 over (name, dtype, shape, bytes) of every tensor in name order, or of those `found`.

    Independent of how the tensors are split into files. Reads every byte of the weights.
    ArtifactError names a tensor that holds an infinity or NaN.
    """
    digest = hashlib.sha256()
    for name, header in (headers(folder) if found is None else found).items():
        digest.update(f"{name}\n{header.dtype}\n{header.shape}\n".encode())
        with (folder / header.file).open("rb") as file:
            file.seek(header.begin)
            for chunk in _chunks(file, header.end - header.begin):
                digest.update(chunk)
                if not finite.are_finite(chunk, header.dtype):
                    raise ArtifactError(
                        f"{folder / header.file}: {name} holds numbers that are not finite (NaN or"
                        " infinity); take an earlier checkpoint, or merge it again in float32"
                    )
    return digest.hexdigest()


def tokenizer_fingerprint(folder: Path) -> str:
    """sha256 over the names and bytes of the tokenizer files that are there."""
    digest = hashlib.sha256()
    for name in companions.found(folder, companions.TOKENIZER):
        digest.update(f"{name}\n{_digest(folder / name).sha256}\n".encode())
    return digest.hexdigest()


def quantization_config(folder: Path) -> dict[str, Any] | None:
    """The `quantization_config` of config.json; None where there is none."""
    path = folder / "config.json"
    try:
        config = foreign_json.read(path)
    except (OSError, ValueError) as fault:
        raise ArtifactError(f"{path} cannot be read as JSON: {fault}") from fault
    if not isinstance(config, dict):
        raise ArtifactError(f"{path} is not a JSON object")
    section = config.get("quantization_config")
    return section if isinstance(section, dict) else None


def format_of(folder: Path, section: Mapping[str, Any], module: str) -> Format:
    """What the `section` of the folder's config.json says of a layer. ArtifactError."""
    try:
        return formats.of_layer(section, module)
    except ArtifactError as fault:
        raise ArtifactError(f"{folder / 'config.json'}: {fault}") from fault


def index(path: Path, ending: str) -> dict[str, str]:
    """The file of each tensor, which ends in `ending`, by the index at `path`. ArtifactError."""
    try:
        raw = foreign_json.read(path)
    except (OSError, ValueError) as fault:
        raise ArtifactError(f"{path} is not an index of tensors: {fault}") from fault
    found = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        expected = 'expected {"weight_map": {tensor: file}}'
        raise ArtifactError(f"{path} is not an index of tensors: {expected}")
    for name in sorted(set(found.values())):
        plain = Path(name).name == name and "\0" not in name and len(name) < _LONGEST_NAME
        if not plain or not name.endswith(ending):
            raise ArtifactError(
                f"{path} points outside its folder: {name!r:.200}; expected the name of a {ending}"
                " file in it"
            )
    return found


def _index(folder: Path) -> dict[str, str] | None:
    """The shard of each tensor; None where one file holds all, which loaders prefer."""
    path = folder / INDEX
    if (folder / SINGLE).is_file() or not path.is_file():
        return None
    return index(path, ".safetensors")


def _shards(folder: Path) -> list[str]:
    index = _index(folder)
    if index is not None:
        return sorted(set(index.values()))
    if not (folder / SINGLE).is_file():
        raise ArtifactError(f"{folder} holds neither {SINGLE} nor {INDEX}")
    return [SINGLE]


def _check_index(folder: Path, found: dict[str, TensorHeader]) -> None:
    for name, shard in (_index(folder) or {}).items():
        if name not in found or found[name].file != shard:
            raise ArtifactError(f"{folder / shard} lacks {name}, which {INDEX} promises")


def _file_names(folder: Path) -> list[str]:
    """What is not a folder itself, sorted; a link to a folder is not.

    Hidden ones are no part of an artifact: a lock, what a killed process left, a hub's notes.
    """
    found = []
    for top, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if (Path(top) / name).is_symlink()]
        plain = [name for name in files if not name.startswith(".")]
        found += [(Path(top) / name).relative_to(folder).as_posix() for name in plain + links]
    return sorted(name for name in found if name != MANIFEST)


def _of_manifest(content: Mapping[str, Any]) -> str:
    """Of what its JSON says, whatever version of ours reads it: not of how it is laid out."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _digest(path: Path) -> FileDigest:
    digest, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        for chunk in _chunks(file, size):
            digest.update(chunk)
    return FileDigest(sha256=digest.hexdigest(), bytes=size)


def _chunks(file: Any, size: int) -> Iterator[bytes]:
    while size > 0:
        interrupt.check()
        chunk: bytes = file.read(min(size, _CHUNK))
        if not chunk:
            raise ArtifactError(f"{file.name} ends {size} bytes early")
        size -= len(chunk)
        yield chunk
