"""`quantserve compare`: an artifact held against its parent.

Exit status 3 with one line when the gate of --max-kl is shut; the result is stored all the same.
torch, transformers and matplotlib are imported when the command runs, not before.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quant import bar, beforehand, paths, recipe, usage
from quant.errors import RecipeError
from quant.lora.adapter_cli import ADAPTERS, Initial
from quant.proof.evidence import Fidelity, Row, choice_rows, choice_title, text_rows, text_title

if TYPE_CHECKING:
    from quant.proof.compare import Found

app = usage.App()

RESULT = "The result"  # a group of options
_TEXTS = "What to measure on"
Text = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", rich_help_panel=_TEXTS, help="measure on windows of this UTF-8 text"
    ),
]
Lines = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        rich_help_panel=_TEXTS,
        help='or on JSONL of {"text": ...} or {"messages": [...]} lines',
    ),
]
Choices = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        rich_help_panel=_TEXTS,
        help='and on JSONL of {"question", "choices": [...], "answer": index} lines; repeatable',
    ),
]
Windows = Annotated[
    int | None, typer.Option(rich_help_panel=_TEXTS, help="windows of the text [32]")
]
Length = Annotated[int | None, typer.Option(rich_help_panel=_TEXTS, help="tokens of each [512]")]
Seed = Annotated[
    int | None,
    typer.Option(rich_help_panel=_TEXTS, help="of the windows drawn and of the resamples [0]"),
]
Device = Annotated[str | None, typer.Option(metavar="DEVICE", help="cpu, cuda or cuda:N [cpu]")]
Cache = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="converted models and self-written text [~/.cache/quantserve]"
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="a JSON object per line on stdout, the result last")
]


@app.command(
    cls=usage.Computing,
    epilog="""quantserve compare demo smollm2 --text book.txt
quantserve compare ./my-model my-w8a8 --adapter ./my-lora --max-kl 0.05 --plot kl.png""",
)
def compare(
    parent: Annotated[
        str,
        typer.Argument(metavar="PARENT", help="what was quantized, as `quantize` takes it"),
    ],
    artifact_folder: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="what `quantize` wrote")
    ],
    text: Text = None,
    calibration: Lines = None,
    choices: Choices = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            rich_help_panel=ADAPTERS,
            help="a LoRA folder that was merged into the artifact; repeatable",
        ),
    ] = None,
    initial: Initial = None,
    windows: Windows = None,
    length: Length = None,
    seed: Seed = None,
    device: Device = None,
    cache: Cache = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=RESULT, help="exit with status 3 when the mean KL is above, in nats"
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=RESULT,
            help="draw each layer's loss and each token's KL into this PNG",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure how far ARTIFACT is from PARENT: perplexity, KL, agreement, answers that flip.

    Without --text, --calibration or --choices the model writes a text of its own that calibrated
    nothing. The result goes into the artifact's manifest and its card, README.md.
    """
    given = {"windows": windows, "length": length, "seed": seed, "device": device}
    draw = recipe.draw({name: value for name, value in given.items() if value is not None})
    recipe.check_limit(max_kl)
    check_text({"--max-kl": max_kl, "--plot": plot}, text, calibration, choices)
    check_place(plot)
    beforehand.Named(
        models=[parent],
        artifacts=[artifact_folder],
        device=draw.device,
        adapters=[*(adapter or ()), initial],
        texts=[text, calibration, *(choices or ())],
    ).check()

    from quant.lora.training import Training
    from quant.proof import compare

    order = compare.Order(
        parent=parent,
        artifact=artifact_folder,
        adapters=tuple(adapter or ()),
        training=Training(initial=initial),
        text=text,
        calibration=calibration,
        choices=tuple(choices or ()),
        cache=cache,
    )
    if as_json:
        found = compare.run(draw, order, bar.Lines())
        bar.write(found.fidelity.model_dump(mode="json"))
    else:
        with bar.Bar("windows") as shown:
            found = compare.run(draw, order, shown)
        _print(found.fidelity)
    _draw(found, plot, artifact_folder)
    compare.check_limit(found.fidelity.text, max_kl, f"the result is in {artifact_folder}")


def check_text(
    wanting: Mapping[str, object],
    text: Path | None,
    calibration: Path | None,
    choices: list[Path] | None,
) -> None:
    """RecipeError where what was given leaves no text for options that need one, or two.

    Before any model is loaded. `wanting` are such options and their values.
    """
    if text is not None and calibration is not None:
        raise RecipeError("--text and --calibration both name the text to measure on; give one")
    if choices and text is None and calibration is None:
        for option in (name for name, value in wanting.items() if value not in (None, False)):
            raise RecipeError(
                f"{option} needs a text, which --choices does not give; add --text or --calibration"
            )


def check_place(plot: Path | None) -> None:
    """RecipeError where the picture could not be written."""
    if plot is not None and not paths.full(plot).absolute().parent.is_dir():
        raise RecipeError(f"--plot {plot}: its folder does not exist; make it first")


def _print(found: Fidelity) -> None:
    if found.text is not None:
        _table(text_title(found.text), text_rows(found.text))
    for quiz in found.choices:
        _table(choice_title(quiz), choice_rows(quiz))


def _table(title: str, rows: Iterator[Row]) -> None:
    shown = bar.table([("", "figure", "95% interval"), *rows], figures=True)
    sys.stdout.write(f"{title}\n{shown}")


def _draw(found: "Found", plot: Path | None, folder: Path) -> None:
    if plot is None or found.trace is None or found.fidelity.text is None:
        return
    from quant.proof import plots

    drawn = plots.Findings(
        name=folder.resolve().name,
        parent=found.manifest.source,
        layers=found.manifest.layers,
        kl=found.trace.kl.numpy(),
        text=found.fidelity.text,
    )
    plots.save(drawn, paths.full(plot))
