"""The format of every layer: the recipe's own for all, or what its bits per weight buy best.

Owns what is on offer. Refuses budgets that no offer reaches, before anything is measured.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from functools import partial

import torch

from quant import formats
from quant.calibration import Batches
from quant.errors import RecipeError
from quant.formats import FULL, INT8, Format, Plan, Shapes
from quant.intake.source import Say, Source, quiet
from quant.recipe import GROUP_SIZES, Recipe, choose_group_size
from quant.solver import budget, layers, sensitivity
from quant.solver.blocks import Decoder
from quant.solver.budget import Offer
from quant.solver.sensitivity import Offers, Unit

STREAMS = 3  # of the calibration's rows: the first judges what the others suggest
_TOKENS = 2048  # of each: what a unit costs is a mean over them


def offered(scheme: str, columns: int, shapes: Iterable[tuple[int, int]] = ()) -> list[Format]:
    """What a layer of so many inputs may be stored as, smallest first.

    W4A16: four bits in each group size that divides the inputs, eight in the largest of those, or
    full precision. W8A8: int8 or full precision. All `shapes` (out, in) hold what is on offer.
    """
    if scheme == "w8a8":
        return [INT8, FULL]
    sizes = [size for size in sorted(GROUP_SIZES, reverse=True) if size > 0 and not columns % size]
    sizes = sizes or [-1]
    forms = [*(Format(4, size) for size in sizes), Format(8, sizes[0]), FULL]
    return [form for form in forms if all(map(form.holds, shapes))]


def offers(scheme: str, shapes: Shapes) -> dict[str, list[Format]]:
    """`offered` to every layer; those that a server loads as one are offered the same."""
    widths = formats.shared_widths(shapes)
    found: dict[str, list[Format]] = {}
    for names in formats.loaded_as_one(shapes):
        parts = [formats.part(name, shapes[name]) for name in names]
        forms = offered(scheme, widths[names[0]], parts)
        found |= dict.fromkeys(names, forms)
    return {name: found[name] for name in shapes}


def bound(recipe: Recipe, shapes: Shapes, say: Say = quiet) -> Plan:
    """The recipe's plan where all layers have one format, else one that is no smaller.

    Says which layers cannot have the recipe's format. RecipeError where none can, where its group
    size does not divide the inputs, or where the budget does not buy the smallest formats.
    """
    if recipe.bits_per_weight is None:
        return _uniform(recipe, shapes, say)
    each = offers(recipe.scheme, shapes)
    _tell_full(shapes, {name for name, forms in each.items() if forms == [FULL]}, 4, say)
    least = formats.bits_per_weight({name: forms[0] for name, forms in each.items()}, shapes)
    if recipe.bits_per_weight < least:
        raise RecipeError(
            f"{recipe.bits_per_weight:g} bits per weight are too few: the smallest formats of this"
            f" model's layers take {math.ceil(least * 100) / 100:.2f}, scales included"
        )
    return {
        name: next(form for form in forms if _bits(form, shapes[name]) >= recipe.bits_per_weight)
        for name, forms in each.items()
    }


def _uniform(recipe: Recipe, shapes: Shapes, say: Say) -> Plan:
    """One format for all, but that inputs which no group divides have one scale a row, and that
    what fills no whole words stays in full precision, with all that a server loads as one with it.
    """
    group = choose_group_size(recipe, (columns for _, columns in shapes.values()))
    widths = formats.shared_widths(shapes)
    chosen: dict[str, Format] = {}
    for names in formats.loaded_as_one(shapes):
        size = group if group > 0 and not widths[names[0]] % group else -1
        form = formats.of_scheme(recipe.scheme, size)
        held = all(form.holds(formats.part(name, shapes[name])) for name in names)
        chosen |= dict.fromkeys(names, form if held else FULL)
    full = {name for name in shapes if chosen[name] == FULL}
    rows = [name for name in shapes if group > 0 > chosen[name].group and name not in full]
    if rows:
        say(
            f"one scale for each row, since no group size divides the inputs: {_count(rows)}, such"
            f" as {rows[0]} with {shapes[rows[0]][1]} inputs"
        )
    _tell_full(shapes, full, recipe.bits, say)
    return {name: chosen[name] for name in shapes}


def _tell_full(shapes: Shapes, full: set[str], bits: int, say: Say) -> None:
    """Says which layers no format but full precision holds; RecipeError where that is all."""
    if not full:
        return
    per_word = 32 // bits
    parts = {name: formats.part(name, shapes[name]) for name in shapes if name in full}
    odd = next(name for name, part in parts.items() if any(size % per_word for size in part))
    rows, columns = parts[odd]
    why = (
        f"{odd} with {columns} inputs and {rows} outputs, which {bits}-bit codes fill by {per_word}"
    )
    if len(full) == len(shapes):
        raise RecipeError(f"no layer of this model can be stored in {bits} bits: {why}; take w8a8")
    say(f"full precision, since codes fill no whole words: {_count(full)}, such as {why}")


def _count(names: Collection[str]) -> str:
    return f"{len(names)} layer{'s' * (len(names) > 1)}"


def within(recipe: Recipe, decoder: Decoder, source: Source, rows: Batches, say: Say) -> Plan:
    """The plan of the least predicted KL within the recipe's bits per weight; says what it is."""
    assert recipe.bits_per_weight is not None, "only a budget has to be measured"
    each, int8_inputs = offers(recipe.scheme, decoder.shapes()), recipe.scheme == "w8a8"
    on_offer = Offers(each, int8_inputs, layers.half(source), recipe.damping)
    parts = streams(rows)
    count = sum(len(ids) for ids, _ in parts)
    say(f"measuring what each layer costs in each format, on {count} rows of the calibration")
    units = sensitivity.measure(decoder, source, parts, on_offer, partial(_told, say))
    plan, loss = chosen(units, decoder.shapes(), recipe.bits_per_weight)
    bits = formats.bits_per_weight(plan, decoder.shapes())
    say(f"{bits:.2f} bits per weight: {formats.listed(plan.values())}; {loss:.2g} nats foreseen")
    return plan


def streams(rows: Batches) -> sensitivity.Rows:
    """The first of the rows, as they are measured on."""
    each = together(*rows.input_ids.shape)
    ids, masks = (torch.split(of, each)[:STREAMS] for of in (rows.input_ids, rows.counted))
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
