"""What to do to a model, complete and frozen; refuses keys and values it does not know."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from quant.errors import RecipeError

Scheme = Literal["w4a16", "w8a16", "w8a8"]
GROUP_SIZES = (32, 64, 128, -1)


class Recipe(BaseModel):
    """`group_size` None lets `choose_group_size` pick; -1 is one group per row.

    `samples` x `length` tokens of calibration: 48 x 256 is seven times the widest input of the
    embedded model, and its self-written text takes about half a minute on two cores.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scheme: Scheme = "w4a16"
    group_size: Literal[32, 64, 128, -1] | None = None
    samples: int = Field(default=48, ge=1, le=65_536)
    length: int = Field(default=256, ge=8, le=131_072)
    seed: int = Field(default=0, ge=0, lt=2**63)
    damping: float = Field(default=0.01, gt=0, le=1)
    device: str = "cpu"

    @model_validator(mode="after")
    def _groups_fit_the_scheme(self) -> Self:
        if self.scheme == "w8a8" and self.group_size is not None:
            raise ValueError("w8a8 has one scale per output channel; leave group_size out")
        return self

    @property
    def bits(self) -> Literal[4, 8]:
        return 4 if self.scheme == "w4a16" else 8


def build(fields: Mapping[str, Any]) -> Recipe:
    """A recipe from what a user typed; every fault in one RecipeError."""
    try:
        return Recipe.model_validate(fields)
    except ValidationError as fault:
        reasons = (f"{_place(e['loc'])}{e['msg']}" for e in fault.errors(include_url=False))
        raise RecipeError("; ".join(reasons)) from fault


def choose_group_size(recipe: Recipe, input_widths: Iterable[int]) -> int:
    """The group size for layers of these input widths (in_features).

    The recipe's own where it names one, else the largest of 128, 64 and 32 that divides every
    width; -1 (per channel) for w8a8. RecipeError names a width that the size does not divide.
    """
    widths = sorted(set(input_widths))
    if recipe.scheme == "w8a8" or recipe.group_size == -1:
        return -1
    for size in (recipe.group_size,) if recipe.group_size else (128, 64, 32):
        odd = [width for width in widths if width % size]
        if not odd:
            return size
    raise RecipeError(
        f"group size {size} does not divide the input width {odd[0]} of a layer"
        f" (widths: {', '.join(map(str, widths))})"
    )


def _place(location: tuple[int | str, ...]) -> str:
    return ".".join(map(str, location)) + ": " if location else ""
