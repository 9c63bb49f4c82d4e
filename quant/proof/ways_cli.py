"""`quantserve adapter compare`: merge an adapter, or swap it, with numbers.

torch and transformers are imported when the command runs, not before.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quant import bar, beforehand, paths, recipe, usage
from quant.errors import RecipeError
from quant.lora.adapter_cli import Initial, TrainingBase
from quant.proof.compare_cli import (
    RESULT,
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

app = usage.App()
_WAYS = "Ways beside the adapter as it is"  # a group of options


@app.command(
    cls=usage.Computing,
    epilog="""quantserve adapter compare ./my-lora --parent ./my-model --base my-w4a16 \\
  --text book.txt --merged my-merged-w4a16""",
)
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
        typer.Option(
            metavar="DIR",
            rich_help_panel=_WAYS,
            help="the same adapter as `adapter export` wrote it; repeatable",
        ),
    ] = None,
    merged: Annotated[
        Path | None,
        typer.Option(
            metavar="ARTIFACT",
            rich_help_panel=_WAYS,
            help="an artifact that the adapter was merged into",
        ),
    ] = None,
    merge: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            rich_help_panel=_WAYS,
            help="or make one here first, by the recipe of ARTIFACT",
        ),
    ] = None,
    merge_calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_WAYS,
            help="for --merge: the file that calibrated ARTIFACT [self-written]",
        ),
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
            rich_help_panel=RESULT,
            help="start `quantserve serve` for each way and time streamed answers to that text",
        ),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=RESULT,
            help="draw KL, sizes and latency of each way into this PNG",
        ),
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
    beforehand.Named(
        models=[parent],
        artifacts=[base, merged],
        targets=[merge],
        device=draw.device,
        adapters=[adapter, initial, *(ready or ())],
        texts=[text, calibration, *(choices or ()), merge_calibration],
    ).check()

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

    names = ("", *(way.name for way in found)), ("", *(str(way.artifact) for way in found))
    rows = [(name, *figures) for name, figures in ways.table(found)]
    sys.stdout.write(bar.table([*names, *rows], figures=True))
