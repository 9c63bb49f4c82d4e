"""The tensors of a LoRA file sorted by what they do to the base. Knows PEFT's names, no numbers.

Refuses a tensor it cannot place and half a pair. Standard library only, as `quant.lora.adapter` is.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from quant.errors import AdapterError
from quant.headers import TensorHeader
from quant.lora.lora_config import LoraConfig, by_pattern

FLOATS = ("BF16", "F16", "F32")
_PREFIX = "base_model.model."
_PAIR = re.compile(
    r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?P<tail>\.weight)?$"
)
# What PEFT saves beside the pairs: DoRA's magnitudes, a pair's own bias, rows of an embedding.
_MAGNITUDE = re.compile(r"^(?P<module>.+)\.lora_magnitude_vector(\.weight)?$")
_OFFSET = re.compile(r"^(?P<module>.+)\.lora_B\.bias$")
_ROWS = re.compile(r"^(?P<module>.+)\.token_adapter\.trainable_tokens_delta$")
_COPY = re.compile(r"^(?P<module>.+)\.base_layer\.(?P<leaf>weight|bias)$")
_WHOLE = re.compile(r"^(?P<module>.+?)(\.modules_to_save)?\.(?P<leaf>weight|bias)$")
_WRAPPED = re.compile(r"^.+\.original_module\.(weight|bias)$")


class Pair(NamedTuple):
    """One adapted module: A [rank, in_features] and B [out_features, rank], by key.

    On an embedding `in_features` are the tokens: its delta lies transposed, [tokens, width].
    """

    a_key: str
    b_key: str
    rank: int
    in_features: int
    out_features: int
    embedding: bool = False


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything in the file; every value but a pair is the key of a tensor.

    `whole` and `copies` are by tensor of the base ("lm_head.weight"), the rest by module. A copy is
    what PEFT saves of a base layer under an adapted embedding or head.
    """

    pairs: Mapping[str, Pair]
    magnitudes: Mapping[str, str]  # [out]
    offsets: Mapping[str, str]  # [out], added to the base's bias
    rows: Mapping[str, str]  # [rows, width]
    whole: Mapping[str, str]
    copies: Mapping[str, str]

    def tensors(self) -> frozenset[str]:
        """The base's tensors that a merge changes."""
        weights = {f"{module}.weight" for module in (*self.pairs, *self.rows)}
        biases = {f"{module}.bias" for module in self.offsets}
        return frozenset(weights | biases | set(self.whole) | set(self.copies))


def sort(path: Path, headers: Mapping[str, TensorHeader], config: LoraConfig) -> Parts:
    """The parts of the file at `path`; AdapterError names the first tensor out of place."""
    sides: dict[str, dict[str, str]] = {}
    found: dict[str, dict[str, str]] = {"magnitudes": {}, "offsets": {}, "rows": {}}
    kinds = (("magnitudes", _MAGNITUDE), ("offsets", _OFFSET), ("rows", _ROWS))
    whole: dict[str, str] = {}
    copies: dict[str, str] = {}
    for key, header in headers.items():
        name = key.removeprefix(_PREFIX)
        if name == key or header.dtype not in FLOATS:
            raise stray(path, key, header)
        if match := _PAIR.match(name):
            if bool(match["embedding"]) == bool(match["tail"]) or len(header.shape) != 2:
                raise stray(path, key, header)
            sides.setdefault(match["module"], {})[match["side"]] = key
            continue
        for kind, pattern in kinds:
            if match := pattern.match(name):
                found[kind][match["module"]] = key
                break
        else:
            _sort_whole(path, key, header, whole, copies)
    if not sides:
        raise AdapterError(f"{path} holds no LoRA weights", field=path.name)
    pairs = {module: _pair(path, keys, headers) for module, keys in sorted(sides.items())}
    _check_ranks(path, pairs, config)
    parts = Parts(pairs=pairs, whole=whole, copies=copies, **found)
    _check_lengths(path, headers, parts, config)
    return parts


def stray(path: Path, key: str, header: TensorHeader) -> AdapterError:
    return AdapterError(
        f"{path}: {key} ({header.dtype} {list(header.shape)}) is not part of a LoRA", field=key
    )


def _sort_whole(
    path: Path, key: str, header: TensorHeader, whole: dict[str, str], copies: dict[str, str]
) -> None:
    name = key.removeprefix(_PREFIX)
    if ".lora_" in name:
        raise stray(path, key, header)
    if match := _COPY.match(name):
        copies[f"{match['module']}.{match['leaf']}"] = key
    elif match := (None if _WRAPPED.match(name) else _WHOLE.match(name)):
        target = f"{match['module']}.{match['leaf']}"
        # PEFT saves a retrained head under two names when the vocabulary grew as well.
        if target not in whole or ".modules_to_save." in key:
            whole[target] = key
    elif not _WRAPPED.match(name):
        raise stray(path, key, header)


def _pair(path: Path, keys: dict[str, str], headers: Mapping[str, TensorHeader]) -> Pair:
    if len(keys) < 2:
        raise AdapterError(f"{path}: {next(iter(keys.values()))} has no partner", field=path.name)
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
    embedding = keys["A"].endswith("lora_embedding_A")
    return Pair(keys["A"], keys["B"], rank, in_features, out_features, embedding)


def _check_ranks(path: Path, pairs: Mapping[str, Pair], config: LoraConfig) -> None:
    for module, pair in pairs.items():
        rank = by_pattern(config.rank_pattern, module, config.r)
        if pair.rank != rank:
            raise AdapterError(
                f"{path}: {module} has rank {pair.rank}, adapter_config.json says {rank}",
                field=f"{module} rank",
                expected=str(rank),
                found=str(pair.rank),
            )


def _check_lengths(
    path: Path, headers: Mapping[str, TensorHeader], parts: Parts, config: LoraConfig
) -> None:
    """Magnitudes and offsets are one number per output of a pair; rows are as many as named."""
    for module, key in (*parts.magnitudes.items(), *parts.offsets.items()):
        pair = parts.pairs.get(module)
        if pair is None or headers[key].shape != (pair.out_features,):
            raise stray(path, key, headers[key])
    for module, key in parts.rows.items():
        count = len(config.token_rows(module))
        if len(headers[key].shape) != 2 or headers[key].shape[0] != count:
            raise AdapterError(
                f"{path}: {key} holds {list(headers[key].shape)}, trainable_token_indices names"
                f" {count} rows",
                field="trainable_token_indices",
                expected=str(count),
                found=str(headers[key].shape[0] if headers[key].shape else 0),
            )
    if config.use_dora and set(parts.magnitudes) != set(parts.pairs):
        raise AdapterError(
            f"{path}: use_dora is set, and {len(parts.magnitudes)} of {len(parts.pairs)} modules"
            " have magnitudes",
            field="use_dora",
        )
    if parts.magnitudes and not config.use_dora:
        key = min(parts.magnitudes.values())
        raise stray(path, key, headers[key])
