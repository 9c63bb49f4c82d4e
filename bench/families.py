"""Every family of models through vLLM: what it computes from an artifact, and what it should.

A tiny random model of each family is quantized to W4A16 and W8A8, and started in vLLM on a CPU with
the flags and environment of `quantserve serve`. Held against it: transformers, in float32, with the
dequantized weights (W8A8: with the layers' inputs rounded). The unquantized parent goes the same
way, so that what vLLM itself gets wrong is told apart from what we do.

    python -m bench.families                    # all, some five minutes on two cores
    python -m bench.families --only glm4 llama
    python -m bench.families --table            # what README prints
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
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
    faults: dict[str, str] | None = None  # in place of a difference


def measure(family: str, warm: Engines, work: Path) -> Row:
    """Makes, serves and compares one family in the folder `work`."""
    parent = families.folder(work / "parent", family)
    ids = tokens.of_text(TEXT, tokens.load_tokenizer(parent))
    found: dict[str, Any] = {"faults": {}}
    for name in ("parent", *SCHEMES):
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
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if manifest.scheme == "w8a8":
        opened = source.open(str(parent), cache=parent.parent / "cache")
        return replica.of_artifact(opened, folder, manifest, torch.device("cpu"))
    plain = folder.with_name(f"{folder.name}-plain")
    plain.mkdir()
    shutil.copyfile(parent / "config.json", plain / "config.json")
    held = dict(checkpoint.dequantized(folder))
    save_file(held, plain / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)


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
        rows = {row.family: row for row in kept()}
        with tempfile.TemporaryDirectory() as place, engines(Path(place) / "log") as warm:
            for family in args.only or families.FAMILIES:
                row = measure(family, warm, Path(place) / family)
                print(row, flush=True)
                rows[family] = row
                RESULTS.write_text(json.dumps([asdict(row) for row in rows.values()], indent=1))
    print("\n".join(table(kept())))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(families.FAMILIES))
    parser.add_argument("--table", action="store_true", help="run nothing, print what was found")
    return parser.parse_args()


def kept() -> list[Row]:
    if not RESULTS.exists():
        return []
    return [Row(**row) for row in json.loads(RESULTS.read_text())]


def table(rows: Sequence[Row]) -> list[str]:
    """README's, in lines."""
    return [str(row) for row in rows]


if __name__ == "__main__":
    main()
