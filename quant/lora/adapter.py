"""A PEFT LoRA folder: read, checked, and held against the base it is to sit on.

Standard library and pydantic only, because a server validates adapters before its engine sees
them. Refuses pickles, tensors that are no part of a LoRA, and non-finite weights.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant import finite, interrupt
from quant.artifact import Manifest
from quant.errors import AdapterError, ArtifactError
from quant.headers import TensorHeader, read_headers
from quant.lora import lora_parts, obstacles, voice
from quant.lora.folder import read_json
from quant.lora.lora_config import LoraConfig, parse
from quant.lora.lora_parts import Pair, Parts
from quant.lora.voice import Voice

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
LINEAGE = "quantserve-adapter.json"
# In a W8A8 artifact, float32 by layer: what its inputs and outputs are divided by beside the
# parent's. Not named *.safetensors, which vLLM would take for weights.
UNITS = "quantserve-units.st"
INPUT_DIVISOR, OUTPUT_DIVISOR = "input_divisor", "output_divisor"
_CHUNK = 1 << 22
_MAX_HEADER = 8 << 20  # bytes: 50,000 tensors, each expert's of a large mixture


@dataclass(frozen=True, slots=True)
class Adapter:
    """`digest` is over configuration, weights and voice: equal digests answer the same.

    `artifact` is the identity of the one artifact that it was exported for, None where it is a
    change of the parent itself. `initial` is the folder of the weights that training started from,
    where they lie beside it.
    """

    folder: Path
    config: LoraConfig
    parts: Parts
    digest: str
    base_fingerprint: str | None
    voice: Voice
    artifact: str | None = None
    initial: Path | None = None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS

    @property
    def pairs(self) -> Mapping[str, Pair]:
        return self.parts.pairs

    @property
    def rank(self) -> int:
        return max(pair.rank for pair in (*self.pairs.values(), *self.parts.stacked.values()))


def read(folder: Path) -> Adapter:
    """An adapter that can be served as it is; AdapterError says why not, and what works instead."""
    adapter = read_trained(folder)
    for obstacle in obstacles.to_serving(adapter.config, adapter.parts):
        raise AdapterError(
            f"{adapter.folder} cannot be served beside its base: {obstacle.reason}; use"
            f" `quantserve adapter {obstacle.remedy}`",
            field=obstacle.field,
            expected="plain LoRA",
            found=obstacle.field,
        )
    return adapter


def read_trained(folder: Path) -> Adapter:
    """The adapter in a folder, of any variant, all of its bytes read once.

    AdapterError names what is wrong.
    """
    folder = folder.resolve()
    config = parse(folder / CONFIG, config_of(folder))
    headers = headers_of(folder)
    parts = lora_parts.sort(folder / WEIGHTS, headers, config)
    own = voice.read(folder)
    digest = digest_of(folder, headers, own.identity())
    base, artifact = lineage(folder)
    return Adapter(folder, config, parts, digest, base, own, artifact, _initial(folder, config))


def config_of(folder: Path) -> dict[str, Any]:
    """adapter_config.json as it stands; AdapterError where there is none."""
    if not folder.is_dir():
        raise AdapterError(f"adapter folder {folder} does not exist", field="folder")
    return read_json(folder / CONFIG)


def headers_of(folder: Path) -> dict[str, TensorHeader]:
    """The tensors of an adapter's safetensors file; AdapterError where it is none."""
    if not (folder / WEIGHTS).is_file():
        raise _no_weights(folder)
    try:
        return read_headers(folder / WEIGHTS, _MAX_HEADER)
    except ArtifactError as fault:
        raise AdapterError(str(fault), field=WEIGHTS) from fault


def validate(
    adapter: Adapter,
    shapes: Mapping[str, tuple[int, int]],
    *,
    max_rank: int | None,
    base_weights_fingerprint: str | None,
    base_artifact: str | None = None,
) -> None:
    """AdapterError naming the first thing that does not fit the base.

    `shapes` are the base's (out_features, in_features) by module, `base_artifact` its identity
    where it is an artifact; None skips the check of rank or weights.
    """
    check_lineage(adapter, base_weights_fingerprint, base_artifact)
    if max_rank is not None and adapter.rank > max_rank:
        raise _misfit(adapter, "rank", expected=f"at most {max_rank}", found=str(adapter.rank))
    for module, pair in adapter.pairs.items():
        found = (pair.out_features, pair.in_features)
        if transposed(adapter, module):
            found = found[::-1]
        if module not in shapes:
            raise AdapterError(
                f"adapter {adapter.folder} does not fit the base: {module}: no such module in the"
                " base; where the base only has another name for it, `quantserve adapter export`"
                " writes that",
                field=module,
                expected="no such module in the base",
                found=_size(found),
            )
        if found != shapes[module]:
            raise _misfit(adapter, module, expected=_size(shapes[module]), found=_size(found))


def check_lineage(adapter: Adapter, weights: str | None, artifact: str | None = None) -> None:
    """AdapterError where the adapter says it was trained on other weights than these, or exported
    for another artifact than the one of this identity."""
    trained_on = adapter.base_fingerprint
    if weights and trained_on and trained_on != weights:
        raise _misfit(adapter, "base weights", expected=weights[:12], found=trained_on[:12])
    if adapter.artifact not in (None, artifact):
        expected = f"one exported for {artifact[:12]}" if artifact else "a change of the parent"
        found = f"one exported for artifact {adapter.artifact[:12]}"
        raise _misfit(adapter, "artifact", expected=expected, found=found)


def identity(manifest: Manifest) -> str:
    """What tells an artifact's tensors from all others: a sha256 over their files' digests."""
    files = (
        f"{name} {file.sha256}\n"
        for name, file in sorted(manifest.files.items())
        if name.endswith(".safetensors") or name == UNITS
    )
    return hashlib.sha256("".join(files).encode()).hexdigest()


def units(folder: Path, manifest: Manifest | None) -> Path | None:
    """Where the artifact in `folder` says what its layers read and put out; None where that is
    what its parent's do. AdapterError for an old W8A8 artifact, which does not say."""
    if manifest is None or manifest.scheme != "w8a8":
        return None
    if UNITS not in manifest.files:
        raise AdapterError(
            f"{folder} was made by a version that did not keep what smoothing divided its layers"
            " by, so that no adapter is right on it; quantize its parent again",
            field="base",
            expected=UNITS,
            found="no such file",
        )
    return folder / UNITS


def transposed(adapter: Adapter, module: str) -> bool:
    """True where the base stores the weight [in, out]: an embedding, or a GPT-2 Conv1D."""
    return adapter.pairs[module].embedding or adapter.config.fan_in_fan_out


def _initial(folder: Path, config: LoraConfig) -> Path | None:
    """Where PEFT's and LLaMA-Factory's recipes save the weights before the first step."""
    if config.start is None:
        return None
    name = f"{config.start.partition('_niter')[0]}_init"
    places = (folder / name, folder.parent / name)
    return next((place for place in places if (place / WEIGHTS).is_file()), None)


def _no_weights(folder: Path) -> AdapterError:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        return AdapterError(
            f"{folder / pickles[0]} is a pickle, which can run code when it is read; load it with"
            f" PEFT where you trust it, and save_pretrained() writes {WEIGHTS} (PEFT 0.7 and later"
            " do so by themselves)",
            field="weights",
            expected=WEIGHTS,
            found=pickles[0],
        )
    return AdapterError(f"{folder / WEIGHTS} is missing", field=WEIGHTS)


def digest_of(folder: Path, headers: dict[str, TensorHeader], own: bytes) -> str:
    """sha256 over both files and what else is its own; refuses a non-finite weight on the way."""
    digest = hashlib.sha256((folder / CONFIG).read_bytes())
    with (folder / WEIGHTS).open("rb") as file:
        digest.update(file.read(min(header.begin for header in headers.values())))
        for key, header in headers.items():
            for start in range(header.begin, header.end, _CHUNK):
                interrupt.check()
                raw = file.read(min(_CHUNK, header.end - start))
                digest.update(raw)
                if not finite.are_finite(raw, header.dtype):
                    raise AdapterError(
                        f"{folder / WEIGHTS}: {key} holds an infinity or NaN",
                        field=key,
                        expected="finite numbers",
                        found="inf or nan",
                    )
    digest.update(own)
    return digest.hexdigest()


def lineage(folder: Path) -> tuple[str | None, str | None]:
    """The weights it was trained on and the artifact it is for, where a lineage file says so."""
    path = folder / LINEAGE
    if not path.is_file():
        return None, None
    raw = read_json(path)
    base, artifact = raw.get("base"), raw.get("artifact")
    weights = base.get("weights") if isinstance(base, dict) else None
    if (
        raw.get("format") != 1
        or not isinstance(weights, str)
        or not isinstance(artifact, str | None)
    ):
        raise AdapterError(
            f"{path} is not a lineage file of format 1",
            field=LINEAGE,
            expected='{"format": 1, "base": {"weights": sha256}}',
            found=json.dumps(raw)[:100],
        )
    return weights, artifact


def _misfit(adapter: Adapter, field: str, *, expected: str, found: str) -> AdapterError:
    return AdapterError(
        f"adapter {adapter.folder} does not fit the base: {field}: expected {expected},"
        f" found {found}",
        field=field,
        expected=expected,
        found=found,
    )


def _size(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"
