"""The format of every layer: the recipe's own for all, or what its bits per weight buy best.

Owns what is on offer. Refuses budgets that no offer reaches, before anything is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch

from quant import formats
from quant.calibration import Batches
from quant.errors import RecipeError
from quant.formats import FULL, INT8, Format, Plan, Shapes
from quant.intake.source import Say, Source
from quant.recipe import GROUP_SIZES, Recipe, choose_group_size
from quant.solver import budget, layers, sensitivity
from quant.solver.blocks import Decoder
from quant.solver.budget import Offer
from quant.solver.sensitivity import Offers, Unit

STREAMS = 3  # of the calibration's rows: the first judges what the others suggest
_TOKENS = 2048  # of each: what a unit costs is a mean over them


def offered(scheme: str, columns: int) -> list[Format]:
    """What a layer of so many inputs may be stored as, smallest first.

    W4A16: four bits in each group size that divides the inputs, eight in the largest of those, or
    full precision. W8A8: int8 or full precision.
    """
    if scheme == "w8a8":
        return [INT8, FULL]
    sizes = [size for size in sorted(GROUP_SIZES, reverse=True) if size > 0 and not columns % size]
    sizes = sizes or [-1]
    return [*(Format(4, size) for size in sizes), Format(8, sizes[0]), FULL]


def bound(recipe: Recipe, shapes: Shapes) -> Plan:
    """The recipe's plan where all layers have one format, else one that is no smaller.

    RecipeError where the budget does not buy the smallest formats.
    """
    if recipe.bits_per_weight is None:
        group = choose_group_size(recipe, (columns for _, columns in shapes.values()))
        return dict.fromkeys(shapes, formats.of_scheme(recipe.scheme, group))
    widths = formats.shared_widths(shapes)
    offers = {name: offered(recipe.scheme, widths[name]) for name in shapes}
    least = formats.bits_per_weight({name: forms[0] for name, forms in offers.items()}, shapes)
    if recipe.bits_per_weight < least:
        raise RecipeError(
            f"{recipe.bits_per_weight:g} bits per weight are too few: the smallest formats of this"
            f" model's layers take {math.ceil(least * 100) / 100:.2f}, scales included"
        )
    return {
        name: next(form for form in forms if _bits(form, shapes[name]) >= recipe.bits_per_weight)
        for name, forms in offers.items()
    }


def within(recipe: Recipe, decoder: Decoder, source: Source, rows: Batches, say: Say) -> Plan:
    """The plan of the least predicted KL within the recipe's bits per weight; says what it is."""
    assert recipe.bits_per_weight is not None, "only a budget has to be measured"
    of_width, int8_inputs = partial(offered, recipe.scheme), recipe.scheme == "w8a8"
    offers = Offers(of_width, int8_inputs, layers.half(source), recipe.damping)
    parts = streams(rows)
    count = sum(len(ids) for ids, _ in parts)
    say(f"measuring what each layer costs in each format, on {count} rows of the calibration")
    units = sensitivity.measure(decoder, source, parts, offers, partial(_told, say))
    plan, loss = chosen(units, decoder.shapes(), recipe.bits_per_weight)
    bits = formats.bits_per_weight(plan, decoder.shapes())
    say(f"{bits:.2f} bits per weight: {formats.listed(plan.values())}; {loss:.2g} nats foreseen")
    return plan


def streams(rows: Batches) -> sensitivity.Rows:
    """The first of the rows, as they are measured on."""
    each = together(*rows.input_ids.shape)
    ids, masks = (torch.split(of, each)[:STREAMS] for of in (rows.input_ids, rows.mask))
    return list(zip(ids, masks, strict=True))


def together(rows: int, length: int) -> int:
    """How many rows make a stream."""
    return max(1, min(_TOKENS // length, rows // STREAMS))


def chosen(units: Sequence[Unit], shapes: Shapes, bits: float) -> tuple[Plan, float]:
    """The best plan of at most `bits` per weight, and the sum of its units' losses in nats."""
    forms = [list(unit.losses) for unit in units]
    offers = [
        [Offer(sum(form.payload(shapes[name]) for name in unit.names), unit.losses[form])
         for form in unit.losses]
        for unit in units
    ]  # fmt: skip
    weights = sum(shapes[name][0] * shapes[name][1] for unit in units for name in unit.names)
    picks = budget.spend(offers, int(bits * weights / 8))
    plan: dict[str, Format] = {}
    loss = 0.0
    for unit, choice, pick in zip(units, forms, picks, strict=True):
        plan |= dict.fromkeys(unit.names, choice[pick])
        loss += unit.losses[choice[pick]]
    return plan, loss


def _told(say: Say, done: int, total: int) -> None:
    if done * 4 // total > (done - 1) * 4 // total:
        say(f"layers and formats: {done * 100 // total}% measured")


def _bits(form: Format, shape: tuple[int, int]) -> float:
    return 8 * form.payload(shape) / (shape[0] * shape[1])
