"""`quantserve quantize` and `quantserve inspect`, beside `quantserve compare`.

Every mistake of the user's is one line on stderr and exit status 2, a shut gate one and 3; Ctrl-C
and SIGTERM are one line and 2, which says where the same command will go on. What nobody foresaw is
one line and 1, a traceback above it with `--debug`. With `--json` the same is an object on stdout,
the last there. torch and transformers are imported when a command runs and nothing is wrong with
what was typed, not before; where they are not installed, one line says which extra brings them.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from quant import artifact, bar, beforehand, extras, interrupt, usage
from quant.artifact import Manifest
from quant.errors import QuantError, RecipeError
from quant.formats import FULL
from quant.interrupt import Interrupted
from quant.lora import adapter_cli
from quant.lora.adapter_cli import ADAPTERS, Initial, TrainingBase
from quant.proof import card, compare_cli, ways_cli
from quant.recipe import build, check_limit

UNFORESEEN = 1  # exit status
_PRECISION, _TEXT, _RESULT = "Precision", "Calibration", "The result"  # groups of options
_LONGEST = 500  # characters of what an exception of somebody else's says


app = usage.App(
    callback=usage.first,
    name="quantserve",
    help="Quantize fine-tuned models into checkpoints that stock vLLM loads.",
)
_OLDER = (
    "note: {} is of an older version and carries no digest of itself: all files are as it says, and"
    " a change of its own would not be seen\n"
)
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
        end(fault, fault.exit_status, str(fault), *_notes(fault))
    except Interrupted as stopped:
        told = _notes(stopped) or ["nothing was written"]
        end(stopped, interrupt.STATUS, "interrupted", *told)
    except known:
        raise
    except Exception as fault:  # noqa: BLE001 # the last net
        if why := extras.told(fault):
            end(fault, extras.MissingExtra.exit_status, why)
        if usage.Asked.traceback:
            traceback.print_exception(fault)
        end(fault, UNFORESEEN, *_unforeseen(fault))


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


def end(fault: Exception, status: int, *told: str) -> NoReturn:
    """Ends the process in one line, and behind `--json` in an object on stdout too."""
    line = "; ".join(told)
    if usage.Asked.json:
        bar.write(
            {"event": "error", "kind": type(fault).__name__, "message": line, "status": status}
        )
    sys.stderr.write(f"quantserve: {line}\n")
    sys.exit(status)


@app.command(
    cls=usage.Computing,
    epilog="""quantserve quantize demo --out smollm2
quantserve quantize ./my-model --adapter ./my-lora --out my-w8a8 --scheme w8a8
quantserve quantize org/model --out model-w4a16 --calibration chats.jsonl --max-kl 0.05""",
)
def quantize(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="a Hugging Face folder, a GGUF file, a hub id, or `demo`: the embedded "
            "SmolLM2-135M-Instruct",
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="the folder to make; it must not exist yet")
    ],
    scheme: Annotated[
        str,
        typer.Option(
            rich_help_panel=_PRECISION,
            metavar="w4a16|w8a16|w8a8",
            help="int4 or int8 weights (GPTQ), or int8 weights and activations",
        ),
    ] = "w4a16",
    group_size: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_PRECISION,
            help="inputs that share a scale: 32, 64, 128 or -1 [the largest that fits]",
        ),
    ] = None,
    bits_per_weight: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_PRECISION,
            help="mixed precision: the formats that cost the model least at this size, scales "
            "included; 4-bit groups of 128 to 32, 8-bit or full precision a layer (w8a8: int8 or "
            "full) [one format for all]",
        ),
    ] = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            rich_help_panel=ADAPTERS,
            help="merge this PEFT LoRA folder in float32 first; repeatable",
        ),
    ] = None,
    training_base: TrainingBase = "stored",
    initial: Initial = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_TEXT,
            help='JSONL of {"text": ...} or {"messages": [...]} lines, or as ShareGPT, Alpaca and '
            "TRL have them, like what the model will be asked [the model writes its own]",
        ),
    ] = None,
    assistant_only: Annotated[
        bool,
        typer.Option(
            rich_help_panel=_TEXT,
            help="of a calibration file's chats, count the assistant's tokens alone",
        ),
    ] = False,
    samples: Annotated[
        int | None, typer.Option(rich_help_panel=_TEXT, help="calibration sequences [48]")
    ] = None,
    length: Annotated[
        int | None, typer.Option(rich_help_panel=_TEXT, help="tokens of each [256]")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(rich_help_panel=_TEXT, help="of everything that is drawn [0]")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:N, or several: cuda:0,cuda:1 [cpu]"),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option(
            rich_help_panel=_PRECISION,
            help="compute blocks in float32, where 16 bits would be faster",
        ),
    ] = False,
    refine: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_PRECISION,
            help="solve every row in so many more column orders and keep the best of them: closer, "
            "for about a tenth more time each [0]",
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="converted models and self-written text [~/.cache/quantserve]"
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option(rich_help_panel=_RESULT, help="replace the artifact at --out")
    ] = False,
    fresh: Annotated[
        bool,
        typer.Option(
            rich_help_panel=_RESULT, help="start over where the same command was cut short [go on]"
        ),
    ] = False,
    max_kl: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_RESULT,
            help="publish nothing, with exit status 3, when the mean KL from the parent on "
            "held-out rows is above, in nats",
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
    if assistant_only:
        beforehand.check_answers(calibration)
    beforehand.Named(models=[source], targets=[out], force=force, device=recipe.device,
                     adapters=[*(adapter or ()), initial], texts=[calibration]).check()  # fmt: skip
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


@app.command(epilog="quantserve inspect smollm2 --layers\nquantserve inspect smollm2 --verify")
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="what `quantize` wrote")],
    verify: Annotated[bool, typer.Option(help="read every file and compare digests")] = False,
    layers: Annotated[bool, typer.Option(help="a line for every layer")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="the manifest as JSON")] = False,
) -> None:
    """Print what an artifact is: parent, recipe, size, and what each layer lost."""
    manifest = beforehand.artifact_of(folder)
    if verify:
        artifact.verify(folder, manifest)
        if manifest.format == 1:
            sys.stderr.write(_OLDER.format(folder / artifact.MANIFEST))
    if as_json:
        bar.write(manifest.model_dump(mode="json"))
        return
    facts = _facts(manifest)
    if verify:
        read = sum(digest.bytes for digest in manifest.files.values())
        facts["verified"] = f"{len(manifest.files)} files, {read:,} bytes: all as they were sealed"
    sys.stdout.write(bar.table(facts.items()))
    if layers:
        sys.stdout.write(bar.table(_layers(manifest), figures=True))


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


def _facts(manifest: Manifest) -> dict[str, str]:
    size = f"{manifest.bytes_before / 1e6:.1f} MB -> {manifest.bytes_after / 1e6:.1f} MB"
    text = manifest.calibration
    widest = f" for {text.widest_input} inputs" if text.widest_input else ""
    worst = max(manifest.layers, key=lambda layer: layer.loss, default=None)
    return {
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
        "answers": str(manifest.first_answers or "not asked"),
        "made": f"{manifest.created:%Y-%m-%d %H:%M} UTC in {manifest.seconds:.0f} s by quantserve "
        f"{manifest.quantserve}, torch {manifest.versions.get('torch', '?')}",
    }


def _layers(manifest: Manifest) -> Iterator[tuple[str, ...]]:
    yield "layer", "bits", "group", "loss", "of rounding", "damping"
    for layer in manifest.layers:
        ratio = layer.loss / layer.rounding_loss if layer.rounding_loss else 1.0
        form = card.form(manifest, layer)
        group = "-" if form == FULL else "row" if form.group < 0 else str(form.group)
        figures = f"{layer.loss:.2e}", f"{ratio:.3f}", f"{layer.damping:g}"
        yield layer.name, str(form.bits), group, *figures


app.registered_commands += compare_cli.app.registered_commands
app.command(
    epilog="quantserve completion bash >> ~/.bashrc\n"
    "quantserve completion fish > ~/.config/fish/completions/quantserve.fish"
)(usage.completion)

if __name__ == "__main__":
    main()
