"""What to do to a model, and how to measure it, complete and frozen.

Refuses keys and values it does not know.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from quant.errors import RecipeError

Scheme = Literal["w4a16", "w8a16", "w8a8"]
GROUP_SIZES = (32, 64, 128, -1)

# What others quantize to and this program does not write, by pattern: why, and what to ask for.
_REFUSED = {
    r"w[123]a\d+": "stock vLLM has no kernel for weights of 1 to 3 bits, its GPTQ has 4 and 8;"
    " w4a16 is the smallest that every vLLM serves",
    r"w[567]a\d+": "stock vLLM has no kernel for weights of 5 to 7 bits, its GPTQ has 4 and 8;"
    " take w8a16, or w4a16",
    r"w4a8.*": "stock vLLM multiplies 4-bit weights with 8-bit activations on Hopper GPUs and Arm"
    " only; take w4a16 for size, w8a8 for 8-bit activations",
    r"w4a4.*|(nv|mx)?fp4.*": "4-bit floats have kernels on the newest GPUs only, and 4-bit"
    " integer activations have none; w4a16 has the same size",
    r"(w8a\d+[-_]?)?(fp8|float8).*|mxfp8": "8-bit floats need a recent GPU; w8a8 is the same"
    " size in integers, which CPUs and older GPUs multiply too",
}

Asked = TypeVar("Asked", bound=BaseModel)


def _known_devices(names: str) -> str:
    for name in names.split(","):
        if not re.fullmatch(r"cpu|cuda(:\d+)?", name.strip()):
            raise ValueError(f"{name!r} is not cpu, cuda or cuda:N, or several with commas between")
    return names


Devices = Annotated[str, AfterValidator(_known_devices)]


class Recipe(BaseModel):
    """`group_size` None lets `choose_group_size` pick; -1 is one group per row. With
    `bits_per_weight`, scales included, every layer gets a format of its own.

    `samples` x `length` tokens of calibration: 48 x 256 is seven times the widest input of the
    embedded model, and its self-written text takes about half a minute on two cores. `exact` has
    blocks computed in float32 where the machine could do it in 16 bits. `refine` has every row
    solved in so many more column orders, and the best kept. `assistant_only` counts no calibration
    tokens but the assistant's; the others are still what those attend to.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scheme: Scheme = "w4a16"
    group_size: Literal[32, 64, 128, -1] | None = None
    bits_per_weight: float | None = Field(default=None, gt=4, le=16)
    samples: int = Field(default=48, ge=1, le=65_536)
    length: int = Field(default=256, ge=8, le=131_072)
    seed: int = Field(default=0, ge=0, lt=2**63)
    damping: float = Field(default=0.01, gt=0, le=1)
    device: Devices = "cpu"
    exact: bool = False
    refine: int = Field(default=0, ge=0, le=256)
    assistant_only: bool = False

    @field_validator("scheme", mode="before")
    @classmethod
    def _is_written(cls, scheme: object) -> object:
        for pattern, reason in _REFUSED.items():
            if isinstance(scheme, str) and re.fullmatch(pattern, scheme, re.IGNORECASE):
                raise ValueError(f"{scheme} is not written: {reason}")
        known = scheme.lower() if isinstance(scheme, str) else scheme  # vLLM's are upper case
        if known not in get_args(Scheme):
            raise ValueError(f"{scheme!r} is not one of {', '.join(get_args(Scheme))}")
        return known

    @model_validator(mode="after")
    def _groups_fit_the_scheme(self) -> Self:
        if self.scheme == "w8a8" and self.group_size is not None:
            raise ValueError("w8a8 has one scale per output channel; leave group_size out")
        if self.bits_per_weight is None:
            return self
        if self.group_size is not None:
            raise ValueError("bits_per_weight chooses group sizes; leave group_size out")
        if self.scheme == "w8a16":
            raise ValueError("bits_per_weight mixes 4 and 8 bits in w4a16; leave w8a16 out")
        return self

    @property
    def bits(self) -> Literal[4, 8]:
        return 4 if self.scheme == "w4a16" else 8


class Draw(BaseModel):
    """Which windows of a text measure a model: how many, of how many tokens, drawn by what seed.

    32 x 512 tokens leave the embedded model's mean KL an interval of 5% on each side. `length`
    None is 512, or all that a shorter model reads.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    windows: int = Field(default=32, ge=1, le=65_536)
    length: int | None = Field(default=None, ge=8, le=131_072)
    seed: int = Field(default=0, ge=0, lt=2**63)
    device: Devices = "cpu"

    def rows(self, positions: int) -> Recipe:
        """As a recipe's samples, for a model that reads `positions` tokens."""
        length = self.length or max(8, min(512, positions))
        return Recipe(samples=self.windows, length=length, seed=self.seed, device=self.device)


def build(fields: Mapping[str, Any]) -> Recipe:
    """A recipe from what a user typed; every fault in one RecipeError."""
    return _checked(fields, Recipe)


def draw(fields: Mapping[str, Any]) -> Draw:
    """The same for the windows of a comparison."""
    return _checked(fields, Draw)


def check_limit(max_kl: float | None) -> None:
    """RecipeError for a mean KL that cannot be held to."""
    if max_kl is not None and not 0 <= max_kl < math.inf:
        raise RecipeError(f"max-kl is {max_kl}; nats of mean KL from 0 up are expected")


def _checked(fields: Mapping[str, Any], kind: type[Asked]) -> Asked:
    try:
        return kind.model_validate(fields)
    except ValidationError as fault:
        reasons = (f"{_place(e['loc'])}{_reason(e)}" for e in fault.errors(include_url=False))
        raise RecipeError("; ".join(reasons)) from fault


def choose_group_size(recipe: Recipe, input_widths: Iterable[int]) -> int:
    """The group size for layers of these input widths (in_features).

    The recipe's own where it names one, else the largest of 128, 64 and 32 that divides every
    width that one of them divides; -1 (per channel) where none does, and for w8a8. RecipeError
    names a width that the recipe's own size does not divide, and the sizes that divide all.
    """
    widths = sorted(set(input_widths))
    if recipe.scheme == "w8a8" or recipe.group_size == -1:
        return -1
    if recipe.group_size is None:
        return next(iter(_dividing(width for width in widths if not width % 32)), -1)
    odd = [width for width in widths if width % recipe.group_size]
    if odd:
        fitting = " and ".join(map(str, [*_dividing(widths), -1]))
        raise RecipeError(
            f"group size {recipe.group_size} does not divide the input width {odd[0]} of a layer"
            f" (widths: {', '.join(map(str, widths))}); group sizes that fit every layer: {fitting}"
        )
    return recipe.group_size


def _dividing(widths: Iterable[int]) -> list[int]:
    """The group sizes that divide all of these widths, the largest first; none of no width."""
    shared = math.gcd(*widths)
    largest_first = sorted(GROUP_SIZES, reverse=True)
    return [size for size in largest_first if size > 0 and shared and not shared % size]


def _reason(error: Mapping[str, Any]) -> str:
    return str(error["msg"]).removeprefix("Value error, ")


def _place(location: tuple[int | str, ...]) -> str:
    return ".".join(map(str, location)) + ": " if location else ""
