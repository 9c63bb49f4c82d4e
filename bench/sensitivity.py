"""The foreseen cost of storing one unit of layers in one format, beside the KL it really has.

    python -m bench.sensitivity demo --calibration texts.jsonl --units 14

For units and formats drawn at random: what `solver.sensitivity` foresees from one pass backward,
the mean KL(parent || parent with that one unit stored so, the layer behind it aimed anew), on text
that neither is fitted to, and, as the rival, the layers' own relative loss. At the end how well
each orders them (Spearman).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quant import calibration, recipe
from quant.formats import FULL, INT8, Format
from quant.intake import source
from quant.proof import replica
from quant.solver import allotment, blocks, descent, gptq, int8, layers, sensitivity, trial
from quant.solver.moments import Hessian
from quant.solver.sensitivity import Offers, Rows, Unit

DAMPING = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--scheme", choices=["w4a16", "w8a8"], default="w4a16")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--units", type=int, default=14)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    opened = source.open(asked.model)
    sizes = recipe.build({"samples": asked.windows, "length": asked.length})
    batches = calibration.prepare(opened, sizes, asked.calibration, print)
    streams = allotment.streams(batches)
    cpu = torch.device("cpu")
    decoder = blocks.skeleton(opened, cpu)
    each = allotment.offers(asked.scheme, decoder.shapes())
    offers = Offers(each, asked.scheme == "w8a8", layers.half(opened), DAMPING)
    units = sensitivity.measure(decoder, opened, streams, offers, _quiet)
    every = [(unit, form) for unit in units for form in unit.losses if form != FULL]
    chosen = random.Random(asked.seed).sample(every, min(asked.units, len(every)))
    model = replica.of_parent(opened, cpu)
    print(f"{'first layer of the unit':38} {'format':20}  foreseen  measured  ratio  layers' loss")
    table = []
    for unit, form in chosen:
        true, own = true_kl(model, unit, behind(units, unit), form, streams)
        table.append((unit.losses[form], own, true))
        print(f"{unit.names[0]:38} {form!s:20}  {unit.losses[form]:.2e}  {true:.2e}"
              f"  {unit.losses[form] / true:5.2f}  {own:.2e}", flush=True)  # fmt: skip
    foreseen, own_losses, measured = map(list, zip(*table, strict=True))
    print(f"rank correlation with the measured: foreseen {spearman(foreseen, measured):.3f},"
          f" layers' own loss {spearman(own_losses, measured):.3f}")  # fmt: skip


@torch.no_grad()
def true_kl(
    model: PreTrainedModel, unit: Unit, adder: Unit | None, form: Format, streams: Rows
) -> tuple[float, float]:
    """Mean KL, on the first of the streams, of the model with one unit stored as the others
    suggest and the layer behind it aimed anew; and the unit's own relative loss."""
    judge, *fitted = streams
    linears = of_unit(model, unit)
    weight = torch.cat([linear.weight for linear in linears])
    solved, own = stored(weight, read(model, linears[0], fitted), form)
    before = predictions(model, judge)
    behind = of_unit(model, adder) if adder else []
    parent = [read(model, linear, fitted) for linear in behind]
    with instead(linears, solved, rounds_inputs=form == INT8), ExitStack() as held:
        for linear, its in zip(behind, parent, strict=True):
            reads = list(zip(its, read(model, linear, fitted), strict=True))
            weight = trial.aimed(linear.weight, reads, DAMPING)
            held.enter_context(instead([linear], weight, rounds_inputs=False))
        after = predictions(model, judge)
    return float((before.double().exp() * (before.double() - after)).sum(-1).mean()), own


def behind(units: Sequence[Unit], unit: Unit) -> Unit | None:
    """The one right behind a unit, if that is a layer which adds to the stream and this is not."""
    place = units.index(unit) + 1
    adds = place < len(units) and units[place].adds and not unit.adds
    return units[place] if adds else None


def of_unit(model: PreTrainedModel, unit: Unit) -> list[nn.Linear]:
    layers = (model.get_submodule(name) for name in unit.names)
    return [layer for layer in layers if isinstance(layer, nn.Linear)]


def read(model: PreTrainedModel, linear: nn.Linear, streams: Rows) -> list[Tensor]:
    """What a layer reads of the real tokens [tokens, columns] of each stream."""
    found: list[Tensor] = []
    hook = linear.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    for ids, _ in streams:
        model(input_ids=ids, use_cache=False)
    hook.remove()
    return [inputs[mask] for inputs, (_, mask) in zip(found, streams, strict=True)]


def predictions(model: PreTrainedModel, stream: tuple[Tensor, Tensor]) -> Tensor:
    """Log-probabilities [tokens, vocabulary] behind every real token."""
    ids, mask = stream
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
