"""`quantserve quantize` and `quantserve inspect`, beside `quantserve compare`.

Every mistake of the user's is one line on stderr and exit status 2, a shut gate one and 3; Ctrl-C
and SIGTERM are one line and 2, which says where the same command will go on. What nobody foresaw is
one line and 1, a traceback above it with `--debug`. torch and transformers are imported when a
command runs, not before; where they are not installed, one line says which extra brings them.
"""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from quant import artifact, bar, extras, interrupt
from quant.artifact import Manifest
from quant.errors import ArtifactError, QuantError, RecipeError
from quant.formats import FULL
from quant.interrupt import Interrupted
from quant.lora import adapter_cli
from quant.lora.adapter_cli import Initial, TrainingBase
from quant.proof import card, compare_cli, ways_cli
from quant.recipe import build, check_limit

UNFORESEEN = 1  # exit status
_LONGEST = 500  # characters of what an exception of somebody else's says


class _Debug:
    """Of this process: whether a traceback is asked for."""

    wanted = False


class Commands(TyperGroup):
    """Takes `--debug` in front of a command's name and behind it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ours = args[: args.index("--")] if "--" in args else args
        others = [word for word in ours if word != "--debug"]
        asked = ["--debug"] if len(others) < len(ours) else []
        return super().parse_args(ctx, [*asked, *others, *args[len(ours) :]])

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as fault:
            if not isinstance(fault, QuantError | Interrupted):
                fault.add_note(f"in `{ctx.command_path} {ctx.invoked_subcommand}`")
            raise


def debug(
    wanted: Annotated[
        bool, typer.Option("--debug", help="show a traceback of an error that nobody foresaw")
    ] = False,
) -> None:
    """What stands before every command."""
    _Debug.wanted = wanted


app = typer.Typer(
    cls=Commands,
    callback=debug,
    name="quantserve",
    help="Quantize fine-tuned models into checkpoints that stock vLLM loads.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
_OLDER = (
    "note: {} is of an older version and carries no digest of itself: all files are as it says, and"
    " a change of its own would not be seen\n"
)
app.registered_commands += compare_cli.app.registered_commands
adapter_cli.app.registered_commands += ways_cli.app.registered_commands
app.add_typer(adapter_cli.app)


def main(run: Callable[[], object] = app, known: tuple[type[Exception], ...] = ()) -> None:
    """Run `run`; a QuantError is one line and its exit status, Ctrl-C and SIGTERM one and 2.

    Any other exception is one line and 1, but those that the caller has `known`.
    """
    try:
        with interrupt.listening("quantserve"):
            run()
    except QuantError as fault:
        _end(fault.exit_status, str(fault), *_notes(fault))
    except Interrupted as stopped:
        _end(interrupt.STATUS, "interrupted", *(_notes(stopped) or ["nothing was written"]))
    except known:
        raise
    except Exception as fault:  # noqa: BLE001 # the last net
        if why := extras.told(fault):
            _end(extras.MissingExtra.exit_status, why)
        if _Debug.wanted:
            traceback.print_exception(fault)
        _end(UNFORESEEN, *_unforeseen(fault))


def _unforeseen(fault: Exception) -> list[str]:
    """Its kind and own words, cut, where it came up, what was noted on its way, and what to do."""
    words = " ".join(str(fault).split())
    said = ": ".join(filter(None, [type(fault).__name__, words[:_LONGEST]]))
    frame = traceback.extract_tb(fault.__traceback__)[-1]
    told = f"unexpected {said} ({Path(frame.filename).name}:{frame.lineno})"
    return [told, *_notes(fault), "with --debug the same command shows how it came to that"]


def _notes(fault: Exception) -> list[str]:
    """What was added to an exception on its way, such as how the next run goes on."""
    return getattr(fault, "__notes__", [])


def _end(status: int, *told: str) -> None:
    sys.stderr.write(f"quantserve: {'; '.join(told)}\n")
    sys.exit(status)


@app.command()
def quantize(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="a Hugging Face folder, a GGUF file, a hub id, or `demo`: the embedded "
            "SmolLM2-135M-Instruct",
        ),
    ],
    out: Annotated[Path, typer.Option(help="the folder to make; it must not exist yet")],
    scheme: Annotated[
        str,
        typer.Option(
            metavar="w4a16|w8a16|w8a8",
            help="int4 or int8 weights (GPTQ), or int8 weights and activations",
        ),
    ] = "w4a16",
    group_size: Annotated[
        int | None,
        typer.Option(help="inputs that share a scale: 32, 64, 128 or -1 [the largest that fits]"),
    ] = None,
    bits_per_weight: Annotated[
        float | None,
        typer.Option(
            help="mixed precision: the formats that cost the model least at this size, scales "
            "included; 4-bit groups of 128 to 32, 8-bit or full precision a layer (w8a8: int8 or "
            "full) [one format for all]"
        ),
    ] = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(help="merge this PEFT LoRA folder in float32 first; repeatable"),
    ] = None,
    training_base: TrainingBase = "stored",
    initial: Initial = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help='JSONL of {"text": ...} or {"messages": [...]} lines, or as ShareGPT, Alpaca and '
            "TRL have them, like what the model will be asked [the model writes its own]"
        ),
    ] = None,
    assistant_only: Annotated[
        bool,
        typer.Option(help="of a calibration file's chats, count the assistant's tokens alone"),
    ] = False,
    samples: Annotated[int | None, typer.Option(help="calibration sequences [48]")] = None,
    length: Annotated[int | None, typer.Option(help="tokens of each [256]")] = None,
    seed: Annotated[int | None, typer.Option(help="of everything that is drawn [0]")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:N, or several: cuda:0,cuda:1 [cpu]")
    ] = None,
    exact: Annotated[
        bool,
        typer.Option(help="compute blocks in float32, where 16 bits would be faster"),
    ] = False,
    refine: Annotated[
        int | None,
        typer.Option(
            help="solve every row in so many more column orders and keep the best of them: closer, "
            "for about a tenth more time each [0]"
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="converted models and self-written text [~/.cache/quantserve]"),
    ] = None,
    force: Annotated[bool, typer.Option(help="replace the artifact at --out")] = False,
    fresh: Annotated[
        bool, typer.Option(help="start over where the same command was cut short [go on]")
    ] = False,
    max_kl: Annotated[
        float | None,
        typer.Option(
            help="publish nothing, with exit status 3, when the mean KL from the parent on "
            "held-out rows is above, in nats"
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="a JSON object per line on stdout, the manifest last")
    ] = False,
) -> None:
    """Quantize SOURCE into a checkpoint that stock vLLM loads.

    Tokenizer, chat template and generation settings travel along; embeddings and output head stay
    as they are. The folder appears when everything in it has been read back and found right.
    """
    given = {"scheme": scheme, "group_size": group_size, "bits_per_weight": bits_per_weight,
             "samples": samples, "length": length, "seed": seed, "device": device,
             "exact": exact or None, "refine": refine,
             "assistant_only": assistant_only or None}  # fmt: skip
    recipe = build({name: value for name, value in given.items() if value is not None})
    check_limit(max_kl)
    if not adapter and (training_base != "stored" or initial is not None):
        raise RecipeError(
            "--training-base and --initial say how an adapter was trained; give it with --adapter"
        )
    hold_threads()

    from quant import pipeline
    from quant.lora.training import Training
    from quant.solver import heap

    heap.share()

    order = pipeline.Order(
        spec=source,
        target=out,
        adapters=tuple(adapter or ()),
        training=Training(training_base, initial),
        calibration_file=calibration,
        cache=cache,
        force=force,
        fresh=fresh,
        max_kl=max_kl,
    )
    if as_json:
        bar.write(pipeline.run(recipe, order, bar.Lines()).model_dump(mode="json"))
        return
    with bar.Bar("layers") as shown:
        manifest = pipeline.run(recipe, order, shown)
    _told(manifest, out)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="what `quantize` wrote")],
    verify: Annotated[bool, typer.Option(help="read every file and compare digests")] = False,
    layers: Annotated[bool, typer.Option(help="a line for every layer")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="the manifest as JSON")] = False,
) -> None:
    """Print what an artifact is: parent, recipe, size, and what each layer lost."""
    manifest = artifact.read(folder)
    if manifest is None:
        raise ArtifactError(f"{folder} has no {artifact.MANIFEST}: it is not an artifact of ours")
    if verify:
        artifact.verify(folder, manifest)
        if manifest.format == 1:
            sys.stderr.write(_OLDER.format(folder / artifact.MANIFEST))
    if as_json:
        bar.write(manifest.model_dump(mode="json"))
        return
    console = Console(highlight=False)
    console.print(_facts(manifest))
    if layers:
        console.print(_layers(manifest))


def hold_threads() -> None:
    """Before torch and numba are loaded, which read this then.

    Every batch's thread has OpenMP workers of its own; those that spin take the cores from the next
    one's. numba's loops set OpenMP's number of threads for everybody, whatever the user gave.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if (given := os.environ.get("OMP_NUM_THREADS", "")).isdigit():
        os.environ.setdefault("NUMBA_NUM_THREADS", given)


def _told(manifest: Manifest, out: Path) -> None:
    before, after = manifest.bytes_before / 1e6, manifest.bytes_after / 1e6
    sys.stdout.write(
        f"{out}: {before:.1f} MB -> {after:.1f} MB in {manifest.seconds:.0f} s "
        f"({len(manifest.layers)} layers, "
        f"{card.gain(manifest.layers):.2f} of the loss of rounding)\n"
        f"next: quantserve serve {out}\n"
    )


def _facts(manifest: Manifest) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    size = f"{manifest.bytes_before / 1e6:.1f} MB -> {manifest.bytes_after / 1e6:.1f} MB"
    text = manifest.calibration
    widest = f" for {text.widest_input} inputs" if text.widest_input else ""
    worst = max(manifest.layers, key=lambda layer: layer.loss, default=None)
    rows = {
        "model": f"{manifest.source} ({manifest.architecture})",
        "parent": f"weights {manifest.parent.weights[:12]}, "
        f"tokenizer {manifest.parent.tokenizer[:12]}",
        "merged": ", ".join(f"{a.name}@{a.digest[:12]}" for a in manifest.adapters) or "no adapter",
        "scheme": card.scheme(manifest),
        "size": f"{size} in {len(manifest.files)} files",
        "calibration": f"{text.samples} x {text.origin}, {text.tokens} tokens{widest} "
        f"({text.digest[:12]})",
        "loss": f"{card.gain(manifest.layers):.3f} of plain rounding's over {len(manifest.layers)} "
        "layers" + (f"; worst {worst.name} ({worst.loss:.2e} of its output)" if worst else ""),
        "made": f"{manifest.created:%Y-%m-%d %H:%M} UTC in {manifest.seconds:.0f} s by quantserve "
        f"{manifest.quantserve}, torch {manifest.versions.get('torch', '?')}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _layers(manifest: Manifest) -> Table:
    table = Table("layer", "bits", "group", "loss", "of rounding", "damping", box=None)
    for layer in manifest.layers:
        ratio = layer.loss / layer.rounding_loss if layer.rounding_loss else 1.0
        form = card.form(manifest, layer)
        group = "-" if form == FULL else "row" if form.group < 0 else str(form.group)
        figures = f"{layer.loss:.2e}", f"{ratio:.3f}", f"{layer.damping:g}"
        table.add_row(layer.name, str(form.bits), group, *figures)
    return table


if __name__ == "__main__":
    main()
