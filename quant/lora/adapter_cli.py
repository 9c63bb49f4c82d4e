"""`quantserve adapter check`, `merge` and `export`.

torch is imported when a command runs, not before.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from quant import artifact, bar, beforehand, recipe, usage
from quant.errors import AdapterError, RecipeError
from quant.lora import obstacles

if TYPE_CHECKING:
    import torch

    from quant.lora.blend import Blended
    from quant.lora.export import Exported
    from quant.lora.suitability import Suitability

app = usage.App(
    name="adapter",
    help="Adapters: check, merge, export folders; put, swap, remove those of a running server.",
)

ADAPTERS = "Adapters"  # a group of options
_MIXING, _COMPENSATION = "How they are merged", "Compensation"

TrainingBase = Annotated[
    artifact.TrainingBase,
    typer.Option(
        rich_help_panel=ADAPTERS,
        help="what training saw of the full-precision model: its weights as stored; as QLoRA "
        "rounds them to NF4, without or with double quantization; or the model is what PiSSA, "
        "LoftQ and the like left",
    ),
]
Initial = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        rich_help_panel=ADAPTERS,
        help="the adapter that PiSSA, OLoRA or CorDA training started from "
        "[START_init in ADAPTER or beside it]",
    ),
]

Cache = Annotated[
    Path | None, typer.Option(metavar="DIR", help="converted models [~/.cache/quantserve]")
]

_Dtype = Literal["bfloat16", "float16", "float32"]
_Json = Annotated[bool, typer.Option("--json", help="JSON on stdout, the result last")]


@app.command(
    cls=usage.Computing,
    epilog="quantserve adapter check ./my-lora\nquantserve adapter check ./my-lora --base my-w4a16",
)
def check(
    adapter: Annotated[
        Path,
        typer.Argument(
            metavar="ADAPTER", help="a PEFT folder: LoRA of any variant, prompt tuning, p-tuning"
        ),
    ],
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="BASE_OR_ARTIFACT", help="hold it against this model folder or artifact, too"
        ),
    ] = None,
    cache: Cache = None,
    as_json: _Json = False,
) -> None:
    """Print what ADAPTER is, and for merging and serving whether they work, or why not.

    Exit status 0 when at least one of the two works, 2 otherwise. Serving adds plain LoRA pairs to
    the base and nothing else; merging takes every variant.
    """
    beforehand.Named(adapters=[adapter], models=[str(base) if base else None]).check()

    from quant.lora import suitability

    found = suitability.judge(adapter, base, cache)
    if as_json:
        bar.write(found.model_dump(mode="json"))
    else:
        typer.echo(_lines(found))
    if not found.usable:
        raise AdapterError(f"{adapter} can neither be merged nor served: the reasons are above")


@app.command(
    cls=usage.Computing,
    epilog="""quantserve adapter merge ./my-model --adapter ./my-lora --out my-merged
quantserve adapter merge demo --adapter ./a=0.7 --adapter ./b=0.3 --method ties --out mixed""",
)
def merge(
    base: Annotated[
        str,
        typer.Argument(metavar="BASE", help="the full-precision model, as `quantize` takes it"),
    ],
    adapter: Annotated[
        list[str],
        typer.Option(metavar="A[=WEIGHT]", help="a LoRA folder and its weight [1]; repeatable"),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="the model folder to make; it must not exist yet")
    ],
    method: Annotated[
        Literal["linear", "cat", "ties", "dare"],
        typer.Option(
            rich_help_panel=_MIXING,
            help="linear: the weighted sum; cat: the same from concatenated factors; ties: trim, "
            "elect a sign, average what agrees; dare: drop at random, rescale, sum",
        ),
    ] = "linear",
    density: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_MIXING,
            help="the part of each change that ties or dare keeps [0.2, 0.5]",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(rich_help_panel=_MIXING, help="of what dare drops")] = 0,
    training_base: TrainingBase = "stored",
    initial: Initial = None,
    dtype: Annotated[
        _Dtype | None, typer.Option(help="of every tensor written [each as in BASE]")
    ] = None,
    cache: Cache = None,
    as_json: _Json = False,
) -> None:
    """Merge adapters into BASE and write a plain model folder that anything loads.

    Takes every LoRA variant; changes are computed and summed in float32, a tensor at a time. A tied
    head that an adapter changes alone gets weights of its own; a grown vocabulary brings its
    tokenizer along.
    """
    named = [_weighted(text) for text in adapter]
    folders = tuple(folder for folder, _ in named)
    beforehand.Named(models=[base], targets=[out], adapters=[*folders, initial]).check()

    from quant.lora import blend, mixture
    from quant.lora.training import Training

    order = blend.Order(
        base=base,
        target=out,
        adapters=folders,
        mixture=mixture.Mixture(tuple(weight for _, weight in named), method, density, seed),
        training=Training(training_base, initial),
        dtype=_dtype(dtype),
        cache=cache,
    )
    if as_json:
        bar.write(blend.run(order, bar.Lines()).told())
        return
    with bar.Bar("tensors") as shown:
        done = blend.run(order, shown)
    typer.echo(_merged(done))


@app.command(
    cls=usage.Computing,
    epilog="""quantserve adapter export ./my-lora --base my-w4a16 --out my-lora-ready
quantserve adapter export ./my-lora --base my-w4a16 --out ready --compensate 8 --parent demo""",
)
def export(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="a PEFT LoRA folder")],
    base: Annotated[
        Path,
        typer.Option(
            metavar="ARTIFACT_OR_FOLDER", help="what it will be served on; decided by fingerprint"
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="the adapter folder to make; it must not exist yet")
    ],
    dtype: Annotated[
        _Dtype | None, typer.Option(help="of the factors [the base's 16 bits]")
    ] = None,
    initial: Initial = None,
    rank: Annotated[
        int | None,
        typer.Option(
            "--compensate",
            rich_help_panel=_COMPENSATION,
            metavar="RANK",
            help="make up for ARTIFACT's quantization in so much rank",
        ),
    ] = None,
    parent: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_COMPENSATION,
            metavar="PARENT",
            help="what was quantized, as `quantize` takes it",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_COMPENSATION,
            help='JSONL of {"text"} or {"messages"} lines of its domain [self-written]',
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(rich_help_panel=_COMPENSATION, help="calibration sequences [48]")
    ] = None,
    length: Annotated[
        int | None, typer.Option(rich_help_panel=_COMPENSATION, help="tokens of each [256]")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(rich_help_panel=_COMPENSATION, help="of the draw [0]")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE", rich_help_panel=_COMPENSATION, help="cpu, cuda or cuda:N [cpu]"
        ),
    ] = None,
    cache: Cache = None,
    as_json: _Json = False,
) -> None:
    """Make ADAPTER ready for hot serving on one base: plain, scaled, of one rank, bound to it.

    Scaling goes into B (lora_alpha is r), ranks are padded to the largest, and a lineage file names
    the base's weights: an adapter trained on the parent fits the artifacts made from it. PiSSA and
    the like become a plain change of doubled rank.

    With --compensate, what the pair computes beside ARTIFACT is brought nearer to PARENT + ADAPTER:
    in closed form, on texts of the adapter's domain. It then fits that artifact alone.
    """
    given = {"samples": samples, "length": length, "seed": seed, "device": device}
    rows = recipe.build({name: value for name, value in given.items() if value is not None})
    stray = given | {"parent": parent, "calibration": calibration}
    if rank is None and (asked := [name for name, value in stray.items() if value is not None]):
        raise RecipeError(f"--{asked[0]} is for --compensate RANK; give that too, or leave it out")
    if rank is not None and parent is None:
        raise RecipeError("--compensate needs --parent: what the artifact was quantized from")

    beforehand.Named(
        models=[parent, str(base)],
        targets=[out],
        device=rows.device,
        adapters=[adapter, initial],
        texts=[calibration],
    ).check()

    from quant.lora import export as exporting
    from quant.lora.compensate import Compensation

    more = (
        Compensation(rank, parent, rows, calibration, cache)
        if rank is not None and parent is not None
        else None
    )
    order = exporting.Order(adapter, base, out, _dtype(dtype), initial, more, cache)
    if as_json:
        bar.write(exporting.run(order, bar.Lines()).told())
        return
    with bar.Bar("modules" if more is None else "blocks") as shown:
        done = exporting.run(order, shown)
    typer.echo(_exported(done))


def _weighted(text: str) -> tuple[Path, float]:
    """A[=WEIGHT]; a folder whose name holds `=` needs a weight, or a `/` at its end."""
    folder, separator, number = text.rpartition("=")
    if not separator:
        return Path(text), 1.0
    try:
        weight = float(number)
    except ValueError as fault:
        if Path(text).is_dir():
            return Path(text), 1.0
        raise RecipeError(f"--adapter {text!r}: expected FOLDER or FOLDER=WEIGHT") from fault
    if not folder or not -1e6 < weight < 1e6:
        raise RecipeError(f"--adapter {text!r}: expected FOLDER=WEIGHT, a finite weight")
    return Path(folder), weight


def _dtype(name: str | None) -> "torch.dtype | None":
    import torch

    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    return None if name is None else known[name]


def _lines(found: "Suitability") -> str:
    targets = ", ".join(f"{tail} x{count}" for tail, count in found.targets.items())
    rows = {
        "adapter": f"{found.name}@{found.digest[:12]}, {found.bytes / 1e6:.1f} MB",
        "variant": ", ".join(found.variant),
        "rank": ", ".join(map(str, found.ranks)),
        "scaling": ", ".join(f"{factor:g}" for factor in found.scaling),
        "targets": targets,
        "base": _base(found),
        "travels": _travels(found),
        "merge": _verdict(found.merge.works, found.merge.reason),
        "swap": _verdict(found.swap.works, found.swap.reason),
    }
    return "\n".join(f"{name:<9}{value}" for name, value in rows.items() if value)


def _base(found: "Suitability") -> str:
    named = found.base_named or "not named"
    return f"{named}, weights {found.base_weights[:12]}" if found.base_weights else named


def _travels(found: "Suitability") -> str:
    told = ", ".join(found.travels) or "weights only"
    return f"{told}; ignored: {', '.join(found.ignored)}" if found.ignored else told


def _verdict(works: bool, reason: str) -> str:
    return f"{'yes' if works else 'no'}: {reason}"


def _merged(done: "Blended") -> str:
    extra = "; its head is untied" * done.untied
    if done.vocabulary is not None:
        extra += f"; {done.vocabulary} rows of vocabulary"
    return (
        f"{done.folder}: {done.changed} of {done.tensors} tensors changed,"
        f" {done.bytes / 1e6:.1f} MB{extra}\nnext: quantserve quantize {done.folder} --out ..."
    )


def _exported(done: "Exported") -> str:
    notes = f", {done.start} undone" if done.start else ""
    if done.merged:
        notes += f"; adds to {', '.join(done.merged)}, merged into the base"
    if done.travels:
        notes += f"; with its {', '.join(done.travels)}"
    limit = obstacles.served_rank(done.rank)
    flag = f" --max-lora-rank {limit}" if limit is not None and limit > obstacles.RANKS[0] else ""
    return (
        f"{done.folder}: rank {done.rank}, {done.modules} modules, {done.dtype},"
        f" {done.bytes / 1e6:.1f} MB, for weights {done.base[:12]}{notes}\n"
        f"next: quantserve serve ARTIFACT{flag} --adapter NAME={done.folder}"
    )
