"""`quantserve adapter compare`: merge an adapter, or swap it, with numbers.

torch and transformers are imported when the command runs, not before.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from quant import bar, paths, recipe
from quant.errors import RecipeError
from quant.lora.adapter_cli import Initial, TrainingBase
from quant.proof.compare_cli import (
    Cache,
    Choices,
    Device,
    Json,
    Length,
    Lines,
    Seed,
    Text,
    Windows,
    check_place,
    check_text,
)

if TYPE_CHECKING:
    from quant.proof.ways import Way

app = typer.Typer()


@app.command()
def compare(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="a PEFT LoRA folder")],
    parent: Annotated[
        str, typer.Option(metavar="PARENT", help="what was quantized, as `quantize` takes it")
    ],
    base: Annotated[
        Path, typer.Option(metavar="ARTIFACT", help="what the adapter is to be served beside")
    ],
    ready: Annotated[
        list[Path] | None,
        typer.Option(help="the same adapter as `adapter export` wrote it; repeatable"),
    ] = None,
    merged: Annotated[
        Path | None, typer.Option(help="an artifact that the adapter was merged into")
    ] = None,
    merge: Annotated[
        Path | None, typer.Option(help="or make one here first, by the recipe of ARTIFACT")
    ] = None,
    merge_calibration: Annotated[
        Path | None,
        typer.Option(help="for --merge: the file that calibrated ARTIFACT [self-written]"),
    ] = None,
    training_base: TrainingBase = "stored",
    initial: Initial = None,
    text: Text = None,
    calibration: Lines = None,
    choices: Choices = None,
    windows: Windows = None,
    length: Length = None,
    seed: Seed = None,
    device: Device = None,
    cache: Cache = None,
    latency: Annotated[
        bool,
        typer.Option(
            "--latency",
            help="start `quantserve serve` for each way and time streamed answers to that text",
        ),
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="draw KL, sizes and latency of each way into this PNG")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure what ADAPTER is worth beside ARTIFACT, and merged: quality, size, latency.

    Everything is held against PARENT with ADAPTER in float32. Give a text of the adapter's own
    domain; without one the model writes a text with the adapter in it.
    """
    given = {"windows": windows, "length": length, "seed": seed, "device": device}
    draw = recipe.draw({name: value for name, value in given.items() if value is not None})
    check_text({"--latency": latency, "--plot": plot}, text, calibration, choices)
    check_place(plot)
    if merged is not None and merge is not None:
        raise RecipeError("--merged names an artifact and --merge makes one; give one of them")
    if merge_calibration is not None and merge is None:
        raise RecipeError("--merge-calibration is for --merge; give that too, or leave it out")

    from quant.lora.training import Training
    from quant.proof import compare, ways
    from quant.solver import heap

    heap.share()
    training = Training(training_base, initial)
    asked = compare.Order(
        parent, base, (adapter,), training, text, calibration, tuple(choices or ()), cache
    )
    order = ways.Order(asked, tuple(ready or ()), merged, merge, merge_calibration, latency)
    if as_json:
        found = ways.run(draw, order, bar.Lines())
        bar.write({"ways": [way.model_dump(mode="json") for way in found]})
    else:
        with bar.Bar("windows") as shown:
            found = ways.run(draw, order, shown)
        _print(found)
    if plot is not None:
        from quant.proof import ways_plot

        ways_plot.save(found, adapter.name, parent, paths.full(plot))


def _print(found: "list[Way]") -> None:
    from quant.proof import ways

    shown = Table(box=None, pad_edge=False)
    shown.add_column("")
    for way in found:
        shown.add_column(f"{way.name}\n{way.artifact}", justify="right", overflow="fold")
    for name, figures in ways.table(found):
        shown.add_row(name, *figures)
    Console(highlight=False).print(shown)
