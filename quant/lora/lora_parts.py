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
from quant.lora.lora_config import LoraConfig

FLOATS = ("BF16", "F16", "F32")
# What trainers wrap around modules, as the intake of models takes it off, and around the model.
_WRAPPER = re.compile(
    r"(?:^|(?<=\.))"
    r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_flat_param)\."
)
_PREFIX = re.compile(r"^(?:module\.)*base_model\.model\.(?:module\.)*")
# In a state dict that PEFT did not save, the adapter's own name stands behind its parts.
_ALIAS = re.compile(
    r"(\.lora_(?:embedding_)?[AB]|\.lora_magnitude_vector|\.trainable_tokens_delta)"
    r"\.(?!(?:weight|bias)$)[^.]+(?=\.|$)|(\.modules_to_save)\.default(?=\.)"
)
_PAIR = re.compile(
    r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?P<tail>\.weight)?$"
)
# What PEFT saves beside the pairs: DoRA's magnitudes, a pair's own bias, rows of an embedding.
_MAGNITUDE = re.compile(r"^(?P<module>.+)\.lora_magnitude_vector(\.weight)?$")
_OFFSET = re.compile(r"^(?P<module>.+)\.lora_B\.bias$")
_ROWS = re.compile(r"^(?P<module>.+)\.token_adapter\.trainable_tokens_delta$")
_COPY = re.compile(r"^(?P<module>.+?)(\.token_adapter)?\.base_layer\.(?P<leaf>weight|bias)$")
_WHOLE = re.compile(r"^(?P<module>.+?)(\.modules_to_save)?\.(?P<leaf>weight|bias)$")
_WRAPPED = re.compile(
    r"^.+\.(original_module\.(weight|bias)|token_adapter\.trainable_tokens_original(\..+)?)$"
)
# Several adapted parameters of one module nest: the outermost pair is the last one's.
NESTED = ".base_layer"


class Share(NamedTuple):
    """The part of a pair on a stack of experts that is one expert's, and of its rows these.

    A is [experts * rank, in], expert by expert, and B [out, rank * experts], rank by rank.
    """

    expert: int
    experts: int
    first: int  # row of the expert's [out, in]


class Pair(NamedTuple):
    """One adapted module: A [rank, in_features] and B [out_features, rank], by key.

    `module` is what the file calls it. `scale` is what B A is multiplied by. On an embedding
    `in_features` are the tokens: its delta lies transposed, [tokens, width].
    """

    a_key: str
    b_key: str
    rank: int
    in_features: int
    out_features: int
    module: str
    scale: float
    embedding: bool = False
    share: Share | None = None


class Rows(NamedTuple):
    """Rows of an embedding that were retrained, [len(indices), width] by key."""

    key: str
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything in the file; `magnitudes`, `offsets`, `whole` and `copies` are keys of tensors.

    `whole` and `copies` are by tensor of the base ("lm_head.weight"), the rest by module. A copy is
    what PEFT saves of a base layer under an adapted embedding or head. `stacked` are pairs on the
    parameters of all experts together: `quant.lora.placement` makes `pairs` of them. `foreign` is
    the first key that is not as PEFT writes it.
    """

    pairs: Mapping[str, Pair]
    magnitudes: Mapping[str, str]  # [out]
    offsets: Mapping[str, str]  # [out], added to the base's bias
    rows: Mapping[str, Rows]
    whole: Mapping[str, str]
    copies: Mapping[str, str]
    stacked: Mapping[str, Pair]
    foreign: str | None = None

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
    names = _names(path, headers)
    for name, key in names.items():
        if match := _PAIR.match(name):
            if bool(match["embedding"]) == bool(match["tail"]) or len(headers[key].shape) != 2:
                raise stray(path, key, headers[key])
            sides.setdefault(match["module"], {})[match["side"]] = key
            continue
        for kind, pattern in kinds:
            if match := pattern.match(name):
                found[kind][match["module"]] = key
                break
        else:
            if not _sort_whole(name, key, whole, copies, config):
                raise stray(path, key, headers[key])
    if not sides:
        raise AdapterError(f"{path} holds no LoRA weights", field=path.name)
    pairs, stacked = _pairs(path, sides, headers, config)
    rows = {module: Rows(key, config.token_rows(module)) for module, key in found["rows"].items()}
    parts = Parts(
        pairs, found["magnitudes"], found["offsets"], rows, whole, copies, stacked, _foreign(names)
    )
    _check_lengths(path, headers, parts, config)
    _check_saved(path, parts, config)
    return parts


def stray(path: Path, key: str, header: TensorHeader) -> AdapterError:
    return AdapterError(
        f"{path}: {key} ({header.dtype} {list(header.shape)}) is not part of a LoRA", field=key
    )


def check_rank(path: Path, name: str, rank: int, config: LoraConfig) -> None:
    """AdapterError unless the file has the rank that the configuration says."""
    expected = config.rank_of(name)
    if rank != expected:
        raise AdapterError(
            f"{path}: {name} has rank {rank}, adapter_config.json says {expected}",
            field=f"{name} rank",
            expected=str(expected),
            found=str(rank),
        )


def _names(path: Path, headers: Mapping[str, TensorHeader]) -> dict[str, str]:
    """The keys by what PEFT would call them, less its prefix."""
    found: dict[str, str] = {}
    for key, header in headers.items():
        bare = _WRAPPER.sub("", key)
        prefix = _PREFIX.match(bare)
        if prefix is None or header.dtype not in FLOATS:
            raise stray(path, key, header)
        name = _ALIAS.sub(lambda match: match[1] or match[2], bare[prefix.end() :])
        if name in found:
            raise AdapterError(
                f"{path}: {found[name]} and {key} are the same tensor of two adapters, or of one"
                " that was saved twice; save the one that is meant, with PEFT",
                field=key,
            )
        found[name] = key
    return found


def _foreign(names: Mapping[str, str]) -> str | None:
    return next((key for name, key in names.items() if key != f"base_model.model.{name}"), None)


def _sort_whole(
    name: str, key: str, whole: dict[str, str], copies: dict[str, str], config: LoraConfig
) -> bool:
    """Whether it is a tensor of the base, or one that PEFT's wrappers save and nothing needs."""
    if ".lora_" in name:
        return False
    if _WRAPPED.match(name):
        return True
    if match := _COPY.match(name):
        copies[f"{match['module']}.{match['leaf']}"] = key
    elif match := _WHOLE.match(name):
        target = f"{match['module']}.{match['leaf']}"
        # PEFT saves a retrained head under two names when the vocabulary grew as well.
        if target not in whole or ".modules_to_save." in key:
            whole[target] = key
    elif set(name.split(".")) & set(config.modules_to_save):  # a parameter of another name
        whole[name.replace(".modules_to_save.", ".")] = key
    else:
        return False
    return True


def _pairs(
    path: Path,
    sides: Mapping[str, dict[str, str]],
    headers: Mapping[str, TensorHeader],
    config: LoraConfig,
) -> tuple[dict[str, Pair], dict[str, Pair]]:
    """By module, and those on stacks of experts apart: their rank is that of one times as many."""
    pairs: dict[str, Pair] = {}
    stacked: dict[str, Pair] = {}
    for module, keys in sorted(sides.items()):
        name, pair = _called(module, config), _pair(path, module, keys, headers, config)
        nested = module.endswith(NESTED) or f"{module}{NESTED}" in sides
        if nested or (config.target_parameters and pair.rank != config.rank_of(name)):
            stacked[module] = pair
        else:
            check_rank(path, name, pair.rank, config)
            _check_targeted(path, name, config)
            pairs[module] = pair
    if stacked and not config.target_parameters:
        raise AdapterError(
            f"{path}: {min(stacked)} is adapted twice, and adapter_config.json names no"
            " target_parameters",
            field="target_parameters",
        )
    return pairs, stacked


def _check_targeted(path: Path, name: str, config: LoraConfig) -> None:
    if (field := None if config.targets(name) else config.leaves_out(name)) is not None:
        raise AdapterError(
            f"{path} adapts {name}, and PEFT would not, by {field} of adapter_config.json: put"
            " back the adapter_config.json that was saved with it",
            field=field,
            expected="a module that is adapted",
            found=name,
        )


def _called(module: str, config: LoraConfig) -> str:
    """What patterns are held against: a router is a parameter for PEFT, though only a matrix."""
    weight = f"{module}.weight"
    return weight if config.targets(weight) else module


def _pair(
    path: Path,
    module: str,
    keys: dict[str, str],
    headers: Mapping[str, TensorHeader],
    config: LoraConfig,
) -> Pair:
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
    return Pair(
        keys["A"],
        keys["B"],
        rank,
        in_features,
        out_features,
        module,
        config.scaling(_called(module, config)),
        embedding="lora_embedding_A" in keys["A"],
    )


def _check_lengths(
    path: Path, headers: Mapping[str, TensorHeader], parts: Parts, config: LoraConfig
) -> None:
    """Magnitudes and offsets are one number per output of a pair; rows are as many as named."""
    for module, key in (*parts.magnitudes.items(), *parts.offsets.items()):
        pair = parts.pairs.get(module)
        if pair is None or headers[key].shape != (pair.out_features,):
            raise stray(path, key, headers[key])
    for key, indices in parts.rows.values():
        if len(headers[key].shape) != 2 or headers[key].shape[0] != len(indices):
            raise AdapterError(
                f"{path}: {key} holds {list(headers[key].shape)}, trainable_token_indices names"
                f" {len(indices)} rows",
                field="trainable_token_indices",
                expected=str(len(indices)),
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


def _check_saved(path: Path, parts: Parts, config: LoraConfig) -> None:
    """Sharded trainers have lost what was trained whole: the base's would be taken in its place."""
    whole = [f".{name}." for name in (*parts.whole, *parts.copies)]
    lost = [m for m in config.modules_to_save if not any(f".{m}." in name for name in whole)]
    rows = [] if parts.rows else [str(row) for row in config.trainable_token_indices]
    for field, missing in (("modules_to_save", lost), ("trainable_token_indices", rows)):
        if missing:
            raise AdapterError(
                f"{path} holds no tensor of {missing[0]}, which {field} of adapter_config.json"
                " names: save the adapter again, with PEFT, or take the name out there",
                field=field,
                expected=missing[0],
                found="no such tensor",
            )
