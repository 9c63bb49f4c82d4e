"""`quantserve doctor`: what this machine can do, and what will hurt."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from quant import usage
from serve import doctor
from serve.doctor import GB, Facts, Finding

app = usage.App()


@app.command("doctor", epilog="quantserve doctor\nquantserve doctor --json > report.json")
def examine(
    as_json: Annotated[bool, typer.Option("--json", help="the same as a JSON object")] = False,
) -> None:
    """Say what this machine will run and how fast, and what stops or slows it.

    Nothing is compiled, downloaded or changed. Exit status 0: quantize and serve can run here; 1:
    one of them cannot.
    """
    from serve import doctor_look

    if sys.stderr.isatty():
        sys.stderr.write("quantserve: importing what quantize and serve import, in children\n")
    facts = doctor_look.look()
    found = doctor.findings(facts)
    if as_json:
        told = facts.model_dump(mode="json") | {
            "findings": [finding.model_dump(mode="json") for finding in found],
            "runs": doctor.runs(facts),
        }
        typer.echo(json.dumps(told, indent=2))
    else:
        typer.echo("\n".join((*lines(facts), *_judged(found))))
    raise typer.Exit(0 if doctor.runs(facts) else 1)


def lines(facts: Facts) -> Iterator[str]:
    """The facts for a reader."""
    rows = {
        "versions": ", ".join(f"{name} {told}" for name, told in facts.versions.items() if told),
        "system": facts.system,
        "processor": f"{facts.processor} ({' '.join(facts.instructions) or 'no AVX2'})",
        "cores": f"{facts.allowed_cores:g} of {facts.cores}; {facts.threads} threads for a server",
        "memory": f"{facts.allowed_memory / GB:.1f} GB may be taken of {facts.memory / GB:.1f} GB",
        "GPU": "; ".join(facts.gpus) or "none",
        "compiler": facts.compiler or "none",
        "disk": f"{facts.disk_free / GB:.1f} GB free",
        "open files": f"{facts.descriptors}, for {facts.connections} connections",
        "settings": ", ".join(f"{name}={told}" for name, told in facts.settings.items())
        or "all default",
    }
    for name, told in rows.items():
        if told:
            yield f"{name:<12}{told}"
    for folder in (facts.cache, *facts.caches):
        yield f"{'cache':<12}{folder.path}: {folder.bytes / 1e6:.0f} MB"
    yield from _speed(facts)


def _speed(facts: Facts) -> Iterator[str]:
    known = facts.kernels
    if known is None:
        return
    where = known.library or f"none of ours: {known.fault or 'they need AVX2'}"
    later = " (compiled at the first start)" if known.library and not known.compiled else ""
    yield f"{'kernels':<12}{where}{later}"
    on = f"on {known.cuda[0]} by vLLM's own kernels" if known.cuda else f"in {facts.serve_dtype}"
    yield f"{'serve':<12}16-bit models {on}, and quantized ones:"
    if not known.cuda:
        for product in known.products:
            speed = product.weights_per_s
            fast = "" if speed is None else f": {speed / 1e9:.1f} G weights/s for one token"
            yield f"{'':<12}{product.kernel}{fast}"
    yield f"{'quantize':<12}blocks in {known.quantize_dtype}, solved in float32"


def _judged(found: list[Finding]) -> Iterator[str]:
    for finding in found:
        yield f"{'STOPS' if finding.stops else 'hurts':<12}{finding.told}"
        yield f"{'':<12}-> {finding.do}"
    if not any(finding.stops for finding in found):
        yield f"{'ready':<12}quantize and serve can run here"
