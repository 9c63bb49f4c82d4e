"""The recipe: complete, frozen, and refused with every reason at once."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from quant.errors import RecipeError
from quant.recipe import Recipe, build, check_limit, choose_group_size, draw


def test_nothing_given_is_a_complete_recipe() -> None:
    recipe = build({})
    assert (recipe.scheme, recipe.group_size, recipe.seed) == ("w4a16", None, 0)
    assert build(recipe.model_dump()) == recipe


def test_a_recipe_does_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        build({}).seed = 1  # type: ignore[misc]  # this is what must fail


@pytest.mark.parametrize(("scheme", "bits"), [("w4a16", 4), ("w8a16", 8), ("w8a8", 8)])
def test_the_scheme_decides_the_bits(scheme: str, bits: int) -> None:
    assert build({"scheme": scheme}).bits == bits


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scheme", "w2a16"),
        ("group_size", 48),
        ("group_size", 0),
        ("bits_per_weight", 4),
        ("refine", -1),
        ("refine", 257),
        ("bits_per_weight", 16.5),
        ("bits_per_weight", float("nan")),
        ("samples", 0),
        ("samples", 65_537),
        ("length", 7),
        ("length", 131_073),
        ("seed", -1),
        ("seed", 2**63),
        ("damping", 0),
        ("damping", 1.5),
        ("damping", float("nan")),
        ("samples", "many"),
        ("group", 64),
    ],
)
def test_an_impossible_value_is_refused_by_its_field(field: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=rf"^{field}: "):
        build({field: value})


@pytest.mark.parametrize(
    ("scheme", "reason", "instead"),
    [
        ("w3a16", "stock vLLM has no kernel for weights of 1 to 3 bits", "w4a16"),
        ("W2A16", "stock vLLM has no kernel for weights of 1 to 3 bits", "w4a16"),
        ("w4a8", "on Hopper GPUs and Arm only", "w8a8"),
        ("w4a8_fp8", "on Hopper GPUs and Arm only", "w8a8"),
        ("w4a4", "4-bit integer activations have none", "w4a16"),
        ("nvfp4", "newest GPUs only", "w4a16"),
        ("fp8", "8-bit floats need a recent GPU", "w8a8"),
        ("w8a8-fp8", "8-bit floats need a recent GPU", "w8a8"),
        ("int4", "is not one of", "w4a16, w8a16, w8a8"),
    ],
)
def test_a_scheme_that_nothing_serves_is_refused_with_what_to_use(
    scheme: str, reason: str, instead: str
) -> None:
    with pytest.raises(RecipeError) as refused:
        build({"scheme": scheme})
    said = str(refused.value)
    assert said.startswith("scheme: ") and scheme in said
    assert reason in said and instead in said
    assert "\n" not in said


def test_every_fault_is_in_the_one_message() -> None:
    with pytest.raises(RecipeError) as refused:
        build({"samples": 0, "length": 1, "colour": "red"})
    assert all(f"{field}: " in str(refused.value) for field in ("samples", "length", "colour"))


@pytest.mark.parametrize(
    ("also", "reason"),
    [
        ({"group_size": 64}, "bits_per_weight chooses group sizes; leave group_size out"),
        ({"scheme": "w8a16"}, "bits_per_weight mixes 4 and 8 bits in w4a16; leave w8a16 out"),
    ],
)
def test_a_budget_stands_alone(also: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        build({"bits_per_weight": 9.0, **also})
    for scheme in ("w4a16", "w8a8"):
        assert build({"scheme": scheme, "bits_per_weight": 9.0}).bits_per_weight == 9.0


@pytest.mark.parametrize("size", [32, 128, -1])
def test_w8a8_takes_no_group_size(size: int) -> None:
    with pytest.raises(RecipeError, match="one scale per output channel"):
        build({"scheme": "w8a8", "group_size": size})


@pytest.mark.parametrize(
    ("widths", "size"),
    [((256, 1024), 128), ((576, 1536), 64), ((96, 256), 32), ((32,), 32), ((128, 128), 128)],
)
def test_the_largest_group_that_fits_every_layer_is_chosen(
    widths: tuple[int, ...], size: int
) -> None:
    assert choose_group_size(Recipe(), widths) == size


@pytest.mark.parametrize(("scheme", "asked"), [("w8a8", None), ("w4a16", -1), ("w8a16", -1)])
def test_one_group_per_row_fits_any_width(scheme: str, asked: int | None) -> None:
    assert choose_group_size(build({"scheme": scheme, "group_size": asked}), [7, 33]) == -1


def test_a_group_size_that_is_asked_for_is_kept() -> None:
    assert choose_group_size(build({"group_size": 32}), [256]) == 32


@pytest.mark.parametrize(
    ("asked", "widths", "told"),
    [
        (64, [80, 64], "64 does not divide the input width 80 of a layer (widths: 64, 80);"
                       " group sizes that fit every layer: -1"),
        (128, [192, 64], "128 does not divide the input width 64 of a layer (widths: 64, 192);"
                         " group sizes that fit every layer: 64 and 32 and -1"),
    ],
)  # fmt: skip
def test_a_group_that_does_not_fit_is_named_with_those_that_do(
    asked: int, widths: list[int], told: str
) -> None:
    with pytest.raises(RecipeError) as refused:
        choose_group_size(build({"group_size": asked}), widths)
    assert str(refused.value) == f"group size {told}"


@pytest.mark.parametrize(
    ("widths", "size"),
    [((80, 64), 64), ((80, 96, 128), 32), ((80, 100), -1), ((33,), -1), ((48, 128, 256), 128)],
)
def test_a_width_that_no_group_divides_does_not_decide(widths: tuple[int, ...], size: int) -> None:
    assert choose_group_size(Recipe(), widths) == size


@pytest.mark.parametrize(
    ("asked", "positions", "length"), [(None, 2048, 512), (None, 64, 64), (96, 64, 96)]
)
def test_windows_are_as_long_as_asked_or_as_the_model_reads(
    asked: int | None, positions: int, length: int
) -> None:
    rows = draw({"windows": 5, "length": asked, "seed": 3}).rows(positions)
    assert (rows.samples, rows.length, rows.seed) == (5, length, 3)


@pytest.mark.parametrize("wrong", [{"windows": 0}, {"length": 7}, {"seed": -1}, {"colour": "red"}])
def test_a_wrong_draw_is_named(wrong: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        draw(wrong)


@pytest.mark.parametrize("limit", [-0.1, float("nan"), float("inf")])
def test_a_limit_that_holds_nothing_back_is_refused(limit: float) -> None:
    with pytest.raises(RecipeError, match="nats of mean KL from 0 up"):
        check_limit(limit)
    check_limit(0.0)
    check_limit(None)
