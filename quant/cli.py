"""`quantserve quantize` and `quantserve inspect`.

Every mistake of the user's is one line on stderr and exit status 2; so is Ctrl-C, and it leaves
nothing behind. torch and transformers are imported when a command runs, not before.
"""

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from quant import artifact
from quant.artifact import LayerReport, Manifest
from quant.errors import ArtifactError, QuantError
from quant.recipe import build

app = typer.Typer(
    name="quantserve",
    help="Quantize fine-tuned models into checkpoints that stock vLLM loads.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


_TYPER_INTERRUPTED = 130  # how Typer leaves on Ctrl-C, without a word


def main(run: Callable[[], object] = app) -> None:
    """Run `run`; a QuantError, or Ctrl-C, is one line and exit status 2."""
    # A shell starts background jobs with SIGINT ignored; a long job has to be stoppable too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run()
    except QuantError as fault:
        sys.stderr.write(f"quantserve: {fault}\n")
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as left:
        if isinstance(left, SystemExit) and left.code != _TYPER_INTERRUPTED:
            raise
        sys.stderr.write("quantserve: interrupted; nothing was written\n")
        sys.exit(2)


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
        Literal["w4a16", "w8a16", "w8a8"],
        typer.Option(help="int4 or int8 weights (GPTQ), or int8 weights and activations"),
    ] = "w4a16",
    group_size: Annotated[
        int | None,
        typer.Option(help="inputs that share a scale: 32, 64, 128 or -1 [the largest that fits]"),
    ] = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(help="merge this PEFT LoRA folder in float32 first; repeatable"),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help='JSONL of {"text": ...} or {"messages": [...]} lines, like what the model will be '
            "asked [the model writes its own]"
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="calibration sequences [48]")] = None,
    length: Annotated[int | None, typer.Option(help="tokens of each [256]")] = None,
    seed: Annotated[int | None, typer.Option(help="of everything that is drawn [0]")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N [cpu]")] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="converted models and self-written text [~/.cache/quantserve]"),
    ] = None,
    force: Annotated[bool, typer.Option(help="replace the artifact at --out")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="a JSON object per line on stdout, the manifest last")
    ] = False,
) -> None:
    """Quantize SOURCE into a checkpoint that stock vLLM loads.

    Tokenizer, chat template and generation settings travel along; embeddings and output head stay
    as they are. The folder appears when everything in it has been read back and found right.
    """
    given = {"scheme": scheme, "group_size": group_size, "samples": samples, "length": length,
             "seed": seed, "device": device}  # fmt: skip
    recipe = build({name: value for name, value in given.items() if value is not None})

    from quant import pipeline

    order = pipeline.Order(
        spec=source,
        target=out,
        adapters=tuple(adapter or ()),
        calibration_file=calibration,
        cache=cache,
        force=force,
    )
    if as_json:
        _json_line(pipeline.run(recipe, order, _Lines()).model_dump(mode="json"))
        return
    with _Bar() as bar:
        manifest = pipeline.run(recipe, order, bar)
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
    if as_json:
        _json_line(manifest.model_dump(mode="json"))
        return
    console = Console(highlight=False)
    console.print(_facts(manifest))
    if layers:
        console.print(_layers(manifest.layers))


class _Bar:
    """A progress bar on stderr: layer, loss, time left."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task("layers", total=1)

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress.live.is_started:  # else stopping would print an empty line
            self._progress.stop()

    def say(self, line: str) -> None:
        self._console.print(f"quantserve: {line}", markup=False, soft_wrap=True)

    def solved(self, report: LayerReport, done: int, total: int) -> None:
        self._progress.start()
        self._progress.update(
            self._task,
            description=f"{report.name}  loss {report.loss:.2e}",
            completed=done,
            total=total,
        )


class _Lines:
    """The same as JSON lines, for machines."""

    def say(self, line: str) -> None:
        _json_line({"event": "stage", "message": line})

    def solved(self, report: LayerReport, done: int, total: int) -> None:
        _json_line({"event": "layer", "done": done, "total": total} | report.model_dump())


def _json_line(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _told(manifest: Manifest, out: Path) -> None:
    before, after = manifest.bytes_before / 1e6, manifest.bytes_after / 1e6
    sys.stdout.write(
        f"{out}: {before:.1f} MB -> {after:.1f} MB in {manifest.seconds:.0f} s "
        f"({len(manifest.layers)} layers, {_gain(manifest.layers):.2f} of the loss of rounding)\n"
        f"next: quantserve serve {out}\n"
    )


def _gain(layers: tuple[LayerReport, ...]) -> float:
    """The layers' mean loss as a fraction of what plain rounding would lose."""
    rounding = sum(layer.rounding_loss for layer in layers)
    return sum(layer.loss for layer in layers) / rounding if rounding else 1.0


def _facts(manifest: Manifest) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    size = f"{manifest.bytes_before / 1e6:.1f} MB -> {manifest.bytes_after / 1e6:.1f} MB"
    group = "per channel" if manifest.group_size == -1 else f"groups of {manifest.group_size}"
    text = manifest.calibration
    worst = max(manifest.layers, key=lambda layer: layer.loss)
    rows = {
        "model": f"{manifest.source} ({manifest.architecture})",
        "parent": f"weights {manifest.parent.weights[:12]}, "
        f"tokenizer {manifest.parent.tokenizer[:12]}",
        "merged": ", ".join(f"{a.name}@{a.digest[:12]}" for a in manifest.adapters) or "no adapter",
        "scheme": f"{manifest.scheme}, {group}",
        "size": f"{size} in {len(manifest.files)} files",
        "calibration": f"{text.samples} x {text.origin}, {text.tokens} tokens ({text.digest[:12]})",
        "loss": f"{_gain(manifest.layers):.3f} of plain rounding's over {len(manifest.layers)} "
        f"layers; worst {worst.name} ({worst.loss:.2e} of its output)",
        "made": f"{manifest.created:%Y-%m-%d %H:%M} UTC in {manifest.seconds:.0f} s by quantserve "
        f"{manifest.quantserve}, torch {manifest.versions.get('torch', '?')}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _layers(layers: tuple[LayerReport, ...]) -> Table:
    table = Table("layer", "loss", "of rounding", "damping", box=None)
    for layer in layers:
        ratio = layer.loss / layer.rounding_loss if layer.rounding_loss else 1.0
        table.add_row(layer.name, f"{layer.loss:.2e}", f"{ratio:.3f}", f"{layer.damping:g}")
    return table


if __name__ == "__main__":
    main()
