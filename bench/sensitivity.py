"""The foreseen cost of storing one unit of layers in one format, beside the KL it really has.

    python -m bench.sensitivity demo --calibration texts.jsonl --units 14

For units and formats drawn at random: what `solver.sensitivity` foresees from one pass backward,
the mean KL(parent || parent with that one unit stored so) on the same windows, and, as the rival,
the layers' own relative loss. At the end how well each orders them (Spearman).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quant import calibration, recipe
from quant.formats import FULL, INT8, Format
from quant.intake import source
from quant.proof import replica
from quant.solver import allotment, blocks, descent, gptq, int8, layers, sensitivity
from quant.solver.moments import Hessian
from quant.solver.sensitivity import Offers, Rows, Unit

DAMPING = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--scheme", choices=["w4a16", "w8a8"], default="w4a16")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--units", type=int, default=14)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    opened = source.open(asked.model)
    sizes = recipe.build({"samples": asked.windows, "length": asked.length})
    batches = calibration.prepare(opened, sizes, asked.calibration, print)
    windows = [
        (ids[None], mask[None]) for ids, mask in zip(batches.input_ids, batches.mask, strict=True)
    ]
    cpu = torch.device("cpu")
    offers = Offers(
        partial(allotment.offered, asked.scheme),
        asked.scheme == "w8a8",
        layers.half(opened),
        DAMPING,
    )
    units = sensitivity.measure(blocks.skeleton(opened, cpu), opened, windows, offers, _quiet)
    every = [(unit, form) for unit in units for form in unit.losses if form != FULL]
    chosen = random.Random(asked.seed).sample(every, min(asked.units, len(every)))
    model = replica.of_parent(opened, cpu)
    print(f"{'first layer of the unit':38} {'format':20}  foreseen  measured  ratio  layers' loss")
    table = []
    for unit, form in chosen:
        true, own = true_kl(model, unit, form, windows)
        table.append((unit.losses[form], own, true))
        print(f"{unit.names[0]:38} {form!s:20}  {unit.losses[form]:.2e}  {true:.2e}"
              f"  {unit.losses[form] / true:5.2f}  {own:.2e}", flush=True)  # fmt: skip
    foreseen, own_losses, measured = map(list, zip(*table, strict=True))
    print(f"rank correlation with the measured: foreseen {spearman(foreseen, measured):.3f},"
          f" layers' own loss {spearman(own_losses, measured):.3f}")  # fmt: skip


@torch.no_grad()
def true_kl(model: PreTrainedModel, unit: Unit, form: Format, windows: Rows) -> tuple[float, float]:
    """Mean KL of the model with one unit stored so, and the unit's own relative loss."""
    linears = [
        layer for name in unit.names if isinstance(layer := model.get_submodule(name), nn.Linear)
    ]
    read: list[Tensor] = []
    hook = linears[0].register_forward_pre_hook(lambda _, args: read.append(args[0].flatten(0, -2)))
    expected = [predictions(model, window) for window in windows]
    hook.remove()
    kept = [rows[mask.flatten()] for rows, (_, mask) in zip(read, windows, strict=True)]
    weight = torch.cat([linear.weight for linear in linears])
    solved, own = stored(weight, kept, form)
    total = tokens = 0.0
    with instead(linears, solved, rounds_inputs=form == INT8):
        for before, window in zip(expected, windows, strict=True):
            after = predictions(model, window)
            total += float((before.double().exp() * (before.double() - after)).sum())
            tokens += len(before)
    return total / tokens, own


def predictions(model: PreTrainedModel, window: tuple[Tensor, Tensor]) -> Tensor:
    """Log-probabilities [tokens, vocabulary] behind every real token."""
    ids, mask = window
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[mask]
    return logits.log_softmax(dim=-1)


def stored(weight: Tensor, inputs: Sequence[Tensor], form: Format) -> tuple[Tensor, float]:
    """The weight as it is solved in a format for these inputs, and its relative loss."""
    hessian = Hessian(weight.shape[1])
    for rows, even in zip(inputs, descent.evening(inputs), strict=True):
        hessian.add((int8.as_served(rows) if form == INT8 else rows) * even)
    matrix = hessian.mean()
    factor = gptq.factorize(matrix, DAMPING, form.group)
    found = gptq.solve(weight, matrix, factor, form.group, layers.levels(form, torch.bfloat16))
    return found.weight(), float(found.loss.sum() / ((weight @ matrix) * weight).sum())


@contextmanager
def instead(linears: Sequence[nn.Linear], weight: Tensor, *, rounds_inputs: bool) -> Iterator[None]:
    """The layers with other weights, [rows of all, columns], and int8 inputs if asked."""
    own = [linear.weight.data for linear in linears]
    hooks = [linear.register_forward_pre_hook(_rounded) for linear in linears if rounds_inputs]
    for linear, part in zip(linears, torch.split(weight, [len(w) for w in own]), strict=True):
        linear.weight.data = part
    yield
    for linear, whole in zip(linears, own, strict=True):
        linear.weight.data = whole
    for hook in hooks:
        hook.remove()


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation."""
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def _rounded(_linear: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (int8.as_served(inputs[0]),)


def _quiet(_done: int, _total: int) -> None:
    """Nobody waits here."""


if __name__ == "__main__":
    main()
