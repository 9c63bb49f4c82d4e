"""A PEFT LoRA folder: read, checked, and held against the base it is to sit on.

Standard library and pydantic only, because a server validates adapters before its engine sees
them. Refuses pickles, everything beyond plain LoRA on linear layers, and non-finite weights.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from quant.errors import AdapterError, ArtifactError
from quant.headers import TensorHeader, read_headers
from quant.lora_config import LoraConfig, by_pattern, parse

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
LINEAGE = "quantserve-adapter.json"
_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")
_MAX_JSON = 16 << 20
_CHUNK = 1 << 22

# Bytes per element, and the bits of its last two (little-endian) bytes that are all ones in an
# infinity or NaN and in no other number.
_EXPONENT = {"BF16": (2, 0x80, 0x7F), "F16": (2, 0x00, 0x7C), "F32": (4, 0x80, 0x7F)}


class Pair(NamedTuple):
    """One adapted module: A [rank, in_features] and B [out_features, rank], by key."""

    a_key: str
    b_key: str
    rank: int
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class Adapter:
    """`digest` is over configuration and weights: equal digests compute the same thing."""

    folder: Path
    config: LoraConfig
    pairs: Mapping[str, Pair]
    digest: str
    base_fingerprint: str | None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS

    @property
    def rank(self) -> int:
        return max(pair.rank for pair in self.pairs.values())


def read(folder: Path) -> Adapter:
    """The adapter in a folder, all of its bytes read once; AdapterError names what is wrong."""
    folder = folder.resolve()
    if not folder.is_dir():
        raise AdapterError(f"adapter folder {folder} does not exist", field="folder")
    config = parse(folder / CONFIG, _json(folder / CONFIG))
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise _no_weights(folder)
    try:
        headers = read_headers(weights)
    except ArtifactError as fault:
        raise AdapterError(str(fault), field=WEIGHTS) from fault
    pairs = _pairs(weights, headers, config)
    return Adapter(folder, config, pairs, _digest(folder, headers), _base(folder / LINEAGE))


def validate(
    adapter: Adapter,
    shapes: Mapping[str, tuple[int, int]],
    *,
    max_rank: int | None,
    base_weights_fingerprint: str | None,
) -> None:
    """AdapterError naming the first thing that does not fit the base.

    `shapes` are the base's (out_features, in_features) by module; None skips its check.
    """
    trained_on = adapter.base_fingerprint
    if trained_on and base_weights_fingerprint and trained_on != base_weights_fingerprint:
        raise _misfit(
            adapter, "base weights", expected=base_weights_fingerprint[:12], found=trained_on[:12]
        )
    if max_rank is not None and adapter.rank > max_rank:
        raise _misfit(adapter, "rank", expected=f"at most {max_rank}", found=str(adapter.rank))
    for module, pair in adapter.pairs.items():
        found = (pair.out_features, pair.in_features)
        if adapter.config.fan_in_fan_out:
            found = found[::-1]
        if module not in shapes:
            raise _misfit(
                adapter, module, expected="no such module in the base", found=_size(found)
            )
        if found != shapes[module]:
            raise _misfit(adapter, module, expected=_size(shapes[module]), found=_size(found))


def scaling(config: LoraConfig, module: str) -> float:
    """The factor before B A: alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732).

    rank_pattern and alpha_pattern override per module, as PEFT matches them.
    """
    alpha = by_pattern(config.alpha_pattern, module, config.lora_alpha)
    rank = by_pattern(config.rank_pattern, module, config.r)
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise AdapterError(f"{path} is missing", field=path.name)
    if path.stat().st_size > _MAX_JSON:
        raise AdapterError(f"{path} is larger than {_MAX_JSON} bytes", field=path.name)
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as fault:
        raise AdapterError(f"{path} is not JSON: {fault}", field=path.name) from fault
    if not isinstance(raw, dict):
        raise AdapterError(f"{path} is not a JSON object", field=path.name)
    return raw


def _no_weights(folder: Path) -> AdapterError:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        return AdapterError(
            f"{folder / pickles[0]} is a pickle, which can run code when it is read; save the"
            " adapter as safetensors",
            field="weights",
            expected=WEIGHTS,
            found=pickles[0],
        )
    return AdapterError(f"{folder / WEIGHTS} is missing", field=WEIGHTS)


def _pairs(path: Path, headers: dict[str, TensorHeader], config: LoraConfig) -> dict[str, Pair]:
    sides: dict[str, dict[str, str]] = {}
    for key, header in headers.items():
        match = _KEY.match(key)
        if match is None or header.dtype not in _EXPONENT or len(header.shape) != 2:
            raise _stray(path, key, header)
        sides.setdefault(match["module"], {})[match["side"]] = key
    if not sides:
        raise AdapterError(f"{path} holds no LoRA weights", field=WEIGHTS)
    pairs = {module: _pair(path, keys, headers) for module, keys in sorted(sides.items())}
    for module, pair in pairs.items():
        rank = by_pattern(config.rank_pattern, module, config.r)
        if pair.rank != rank:
            raise AdapterError(
                f"{path}: {module} has rank {pair.rank}, {CONFIG} says {rank}",
                field=f"{module} rank",
                expected=str(rank),
                found=str(pair.rank),
            )
    return pairs


def _stray(path: Path, key: str, header: TensorHeader) -> AdapterError:
    # PEFT copies the base's own head or embedding into the file when it is a target.
    copied = key.endswith(".base_layer.weight")
    hint = "; save the adapter with save_embedding_layers=False" if copied else ""
    return AdapterError(
        f"{path}: {key} ({header.dtype} {list(header.shape)}) is not part of a plain LoRA{hint}",
        field=key,
    )


def _pair(path: Path, keys: dict[str, str], headers: dict[str, TensorHeader]) -> Pair:
    if len(keys) < 2:
        raise AdapterError(f"{path}: {next(iter(keys.values()))} has no partner", field=WEIGHTS)
    (rank, in_features), (out_features, columns) = (
        headers[keys["A"]].shape,
        headers[keys["B"]].shape,
    )
    if rank != columns or rank < 1:
        raise AdapterError(
            f"{path}: {keys['A']} has rank {rank}, {keys['B']} has {columns}",
            field=keys["B"],
            expected=str(rank),
            found=str(columns),
        )
    return Pair(keys["A"], keys["B"], rank, in_features, out_features)


def _digest(folder: Path, headers: dict[str, TensorHeader]) -> str:
    """sha256 over both files; refuses a non-finite weight on the way."""
    digest = hashlib.sha256((folder / CONFIG).read_bytes())
    with (folder / WEIGHTS).open("rb") as file:
        digest.update(file.read(min(header.begin for header in headers.values())))
        for key, header in headers.items():
            for start in range(header.begin, header.end, _CHUNK):
                raw = file.read(min(_CHUNK, header.end - start))
                digest.update(raw)
                if not _finite(raw, header.dtype):
                    raise AdapterError(
                        f"{folder / WEIGHTS}: {key} holds an infinity or NaN",
                        field=key,
                        expected="finite numbers",
                        found="inf or nan",
                    )
    return digest.hexdigest()


def _finite(raw: bytes, dtype: str) -> bool:
    size, low_mask, high_mask = _EXPONENT[dtype]
    high, low = raw[size - 1 :: size], raw[size - 2 :: size]
    # Sane weights have no such high byte at all: found (or not) at memory speed.
    if not any(bytes([sign | mask]) in high for sign in (0, 0x80) for mask in _ones(high_mask)):
        return True
    both = zip(high, low, strict=True)
    return not any(h & high_mask == high_mask and lo & low_mask == low_mask for h, lo in both)


def _ones(mask: int) -> range:
    """Every low seven bits that include the mask's: 7C..7F for 7C, 7F for 7F."""
    return range(mask, 0x80)


def _base(path: Path) -> str | None:
    """The weights fingerprint of the base it was trained on, where a lineage file says so."""
    if not path.is_file():
        return None
    raw = _json(path)
    base = raw.get("base")
    weights = base.get("weights") if isinstance(base, dict) else None
    if raw.get("format") != 1 or not isinstance(weights, str):
        raise AdapterError(
            f"{path} is not a lineage file of format 1",
            field=LINEAGE,
            expected='{"format": 1, "base": {"weights": sha256}}',
            found=json.dumps(raw)[:100],
        )
    return weights


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
