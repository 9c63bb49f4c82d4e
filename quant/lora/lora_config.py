"""What PEFT's adapter_config.json asks for. Refuses every field that would change the answer and
that nothing here computes. Field meanings: PEFT 0.21, LoraConfig.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    StringConstraints,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import SchemaError

from quant.errors import AdapterError
from quant.lora import kinds

# Keys that say how an adapter was trained, or where, and not what it computes.
_HARMLESS = frozenset({
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode",
    "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
})  # fmt: skip
_NEEDED = ("r", "lora_alpha")  # null is no number, to PEFT and to vLLM
_REASONS = {
    "layer_replication": "it repeats layers of the base",
    "alora_invocation_tokens": "activated LoRA switches on inside a prompt",
}
# Starting points that change the base weights themselves: the saved pair is no delta of the
# published base, unless PEFT converted it while saving (it then stores `true` here).
_MUTATING = ("pissa", "olora", "corda", "lora_ga", "loftq")
_MOST_PATTERNS, _LONGEST_PATTERN = 16384, 300  # a mixture of experts may name each of its modules
_MOST_EXPRESSIONS = 32  # of those that are more than a name
_MOST_PARAMETERS = 1024
_LAYER = re.compile(r"\.(\d{1,9})\.")  # the first: an expert's number is further on
_NAME = re.compile(r"[\w.^$\\-]*")
# Counts of one character or class, as in [0-9]{1,2}: every state of the automaton may be alive at
# every character of a name, and larger counts, or those of a group, are many states.
_COUNT = re.compile(r"(?<![)\\])\{(\d{1,2})(?:,(\d{0,2}))?\}")
_MOST_COUNTED = 20
# What an engine that backtracks does with a pattern: it multiplies its choices.
_REPEATED_GROUP, _REPEAT, _CHOICE = (re.compile(p) for p in (r"\)[*+{]", r"[*+{]", r"[?|]"))
_MOST_REPEATS, _MOST_CHOICES = 2, 8
# Inside of a class these are operators to one engine and characters to the other.
_AMBIGUOUS = ("&&", "--", "~~", "||", "[[")


MOST_RANK, MOST_ALPHA = 1 << 20, 1e12


class LoraConfig(BaseModel):
    """The fields that decide what an adapter computes."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    peft_type: Literal["LORA"]
    r: int = Field(default=8, ge=1, le=MOST_RANK)
    lora_alpha: FiniteFloat = Field(8, ge=-MOST_ALPHA, le=MOST_ALPHA)
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, FiniteFloat] = {}
    fan_in_fan_out: bool = False
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    layers_pattern: str | tuple[str, ...] | None = None
    layers_to_transform: int | tuple[int, ...] | None = None
    target_parameters: tuple[str, ...] = Field((), max_length=_MOST_PARAMETERS)
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    modules_to_save: tuple[str, ...] = ()
    trainable_token_indices: tuple[int, ...] | dict[str, tuple[int, ...]] = ()
    base_model_name_or_path: str | None = None
    init_lora_weights: bool | str = True

    @property
    def start(self) -> str | None:
        """The starting point that changed the base, as `pissa_niter_4`; None where none did."""
        start = str(self.init_lora_weights).lower()
        return start if start.startswith(_MUTATING) else None

    @property
    def endless(self) -> str | None:
        """The field with a pattern that a backtracking engine, which vLLM's is, may search for
        longer than anybody waits; None where there is none."""
        fields = {"rank_pattern": [*self.rank_pattern], "alpha_pattern": [*self.alpha_pattern]}
        found = (name for name, given in fields.items() if any(_is_endless(p) for p in given))
        return next(found, None)

    def rank_of(self, name: str) -> int:
        """The rank of what the adapter calls so: r, unless rank_pattern says otherwise."""
        return int(by_pattern(self.rank_pattern, name, self.r))

    def scaling(self, name: str) -> float:
        """The factor before B A: alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732).

        rank_pattern and alpha_pattern override by name, as PEFT matches them.
        """
        alpha, rank = by_pattern(self.alpha_pattern, name, self.lora_alpha), self.rank_of(name)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def targets(self, parameter: str) -> bool:
        """Whether target_parameters names this tensor, by all of its name or by its last parts."""
        return any(f".{parameter}".endswith(f".{name}") for name in self.target_parameters)

    def leaves_out(self, name: str) -> str | None:
        """The field by which PEFT would adapt no module of this name, and pass over its tensors.

        Lists and numbers of layers are looked at; whoever writes an expression is believed.
        """
        if isinstance(self.target_modules, tuple) and not _ends_as(name, self.target_modules):
            return "target_modules"
        if isinstance(self.exclude_modules, tuple) and _ends_as(name, self.exclude_modules):
            return "exclude_modules"
        layers = self.layers_to_transform
        asked = (layers,) if isinstance(layers, int) else layers
        place = (
            None
            if self.layers_pattern or isinstance(self.target_modules, str)
            else _LAYER.search(name)
        )
        if asked and place is not None and int(place[1]) not in asked:
            return "layers_to_transform"
        return None

    def token_rows(self, module: str) -> tuple[int, ...]:
        """The rows of an embedding that were retrained."""
        if not isinstance(self.trainable_token_indices, dict):
            return self.trainable_token_indices
        tails = (n for n in self.trainable_token_indices if f".{module}".endswith(f".{n}"))
        return next((self.trainable_token_indices[tail] for tail in tails), ())


def parse(path: Path, raw: Mapping[str, Any]) -> LoraConfig:
    """The configuration in `raw`, read from `path`; AdapterError names the field at fault."""
    kinds.check(path, raw, "LORA")
    fields = {key: v for key, v in raw.items() if v is not None or key in _NEEDED}
    for key, value in fields.items():
        # A key we do not know is harmless only while it is switched off.
        if key not in LoraConfig.model_fields and key not in _HARMLESS and value:
            reason = _REASONS.get(key, "it is not known here")
            raise AdapterError(
                f"{path}: {key} is not supported: {reason}",
                field=key,
                expected="not set",
                found=json.dumps(value)[:100],
            )
    try:
        # PEFT takes values as they are: "false" is true to it, and "8" ends in its arithmetic.
        config = LoraConfig.model_validate_json(json.dumps(fields), strict=True)
    except ValidationError as fault:
        first = fault.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise AdapterError(
            f"{path}: {field}: {first['msg']}",
            field=field,
            expected=str(first.get("ctx", {}).get("expected", first["type"])),
            found=repr(first["input"])[:100],
        ) from fault
    _check_patterns(path, "rank_pattern", config.rank_pattern, least=1)
    _check_patterns(path, "alpha_pattern", config.alpha_pattern, least=None)
    return config


def _ends_as(name: str, tails: Sequence[str]) -> bool:
    return any(f".{name}".endswith(f".{tail}") for tail in tails)


def by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first pattern that matches the name, or its tail after a dot."""
    for pattern, value in patterns.items():
        if _matcher(pattern)(module):
            return value
    return default


@lru_cache(maxsize=_MOST_PATTERNS)
def _matcher(pattern: str) -> Callable[[str], object]:
    """PEFT's `re.match` of a name, in time that grows with the name's length and no faster.

    A file must not choose how long we search. Expressions go to the engine behind pydantic, which
    never backtracks (https://docs.rs/regex).
    """
    whole = rf"^(?:(.*\.)?({pattern})$)"
    if _NAME.fullmatch(pattern):
        return re.compile(whole).match
    adapter = TypeAdapter(Annotated[str, StringConstraints(pattern=whole)])
    return adapter.validator.isinstance_python


def _is_endless(pattern: str) -> bool:
    repeats, choices = len(_REPEAT.findall(pattern)), len(_CHOICE.findall(pattern))
    many = repeats > _MOST_REPEATS or choices > _MOST_CHOICES
    return many or _REPEATED_GROUP.search(pattern) is not None


def _refuse_unbounded(path: Path, field: str, pattern: str) -> None:
    if len(pattern) > _LONGEST_PATTERN:
        raise AdapterError(
            f"{path}: {field}: a pattern of {len(pattern)} characters, at most {_LONGEST_PATTERN}",
            field=field,
        )
    counted = sum(int(most or least) for least, most in _COUNT.findall(pattern))
    reason = f"it counts a group, or beyond {_MOST_COUNTED}, or has an operator within a class"
    odd = re.search(r"(?<!\\)\{", _COUNT.sub("", pattern))
    if not odd and counted <= _MOST_COUNTED and not any(mark in pattern for mark in _AMBIGUOUS):
        try:
            re.compile(rf"(.*\.)?({pattern})$")
            _matcher(pattern)
        except re.error as fault:
            reason = str(fault)
        except SchemaError:
            reason = "it looks around, or back at a group, or is too large"
        else:
            return
    raise AdapterError(
        f"{path}: {field}: {pattern!r} is not matched: {reason}; write a simpler pattern of the"
        " same modules there, or their names",
        field=field,
        expected="a module's name or a pattern",
        found=pattern,
    )


def _check_patterns(
    path: Path, field: str, patterns: Mapping[str, float], *, least: int | None
) -> None:
    expressions = sum(not _NAME.fullmatch(pattern) for pattern in patterns)
    if len(patterns) > _MOST_PATTERNS or expressions > _MOST_EXPRESSIONS:
        raise AdapterError(
            f"{path}: {field}: {len(patterns)} patterns, {expressions} of them more than a name; at"
            f" most {_MOST_PATTERNS} and {_MOST_EXPRESSIONS}",
            field=field,
        )
    for pattern, value in patterns.items():
        _refuse_unbounded(path, field, pattern)
        if least is not None and value < least:
            raise AdapterError(
                f"{path}: {field}: {pattern!r} is {value}",
                field=field,
                expected=f"at least {least}",
                found=str(value),
            )
