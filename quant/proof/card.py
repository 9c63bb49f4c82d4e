"""The model card of an artifact: README.md as a model hub shows it, written from the manifest.

Leaves a README.md alone that somebody else wrote. Knows no more than the manifest does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from quant import artifact, durable, formats
from quant.artifact import LayerReport, Manifest
from quant.formats import Format
from quant.proof.evidence import Fidelity, Row, choice_rows, choice_title, text_rows, text_title

NAME = artifact.CARD
_MARK = "<!-- Written by quantserve from quantserve.json; `quantserve compare` writes it again. -->"
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_WEIGHTS = {
    "w4a16": "int4 weights, 16-bit activations (GPTQ)",
    "w8a16": "int8 weights, 16-bit activations (GPTQ)",
    "w8a8": "int8 weights, int8 activations with a scale per token",
}
_TRAINED_ON = {
    "nf4": "the parent in NF4, as QLoRA, dequantized here",
    "nf4-double": "the parent in NF4 with double quantization, as QLoRA, dequantized here",
    "residual": "the parent, which is what the adapter's start left",
}
_FORMAT = {"w4a16": "gptq", "w8a16": "gptq", "w8a8": "compressed-tensors"}


def write(folder: Path, manifest: Manifest, name: str) -> bool:
    """Writes the card of the artifact called `name`, by one rename; False where it may not."""
    path = folder / NAME
    if path.exists() and _MARK not in path.read_text("utf-8", errors="replace"):
        return False
    durable.replace(path, text(manifest, name))
    return True


def text(manifest: Manifest, name: str) -> str:
    """The whole card as Markdown."""
    parts = (
        *_front(manifest),
        _MARK,
        f"\n# {name}\n",
        f"`{manifest.source}` ({manifest.architecture}) with {_WEIGHTS[manifest.scheme]}."
        f" Embeddings and output head are as they were. {_shrunk(manifest)}\n",
        *_table(("", ""), _facts(manifest)),
        "\n## Fidelity\n",
        *_fidelity(manifest.fidelity),
        "\n## Serve\n",
        *_serving(name),
    )
    return "\n".join(parts) + "\n"


def scheme(manifest: Manifest) -> str:
    """How the layers are stored: one format, or how many have which, and the bits in all."""
    forms = [form(manifest, layer) for layer in manifest.layers]
    if len(set(forms)) < 2:
        return f"{manifest.scheme}, {Format(manifest.bits, manifest.group_size).grouping()}"
    listed = formats.listed(forms)
    return f"{manifest.scheme}, {manifest.bits_per_weight:.2f} bits per weight: {listed}"


def form(manifest: Manifest, layer: LayerReport) -> Format:
    """How one layer is stored."""
    if layer.bits is None:
        return Format(manifest.bits, manifest.group_size)
    return Format(layer.bits, layer.group)


def gain(layers: Sequence[LayerReport]) -> float:
    """The layers' mean loss as a fraction of what plain rounding would lose."""
    rounding = sum(layer.rounding_loss for layer in layers)
    return sum(layer.loss for layer in layers) / rounding if rounding else 1.0


def _front(manifest: Manifest) -> Iterator[str]:
    yield "---"
    if _HUB_ID.match(manifest.source):
        yield f"base_model: {manifest.source}"
        yield "base_model_relation: quantized"
    yield "pipeline_tag: text-generation"
    tags = ("quantserve", manifest.scheme, _FORMAT[manifest.scheme], "vllm")
    yield f"tags: [{', '.join(tags)}]"
    yield "---"


def _shrunk(manifest: Manifest) -> str:
    before, after = manifest.bytes_before / 1e6, manifest.bytes_after / 1e6
    return f"{before:,.1f} MB became {after:,.1f} MB ({before / after:.2f} times smaller)."


def _facts(manifest: Manifest) -> Iterator[tuple[str, ...]]:
    yield "parent", f"weights `{manifest.parent.weights}`"
    yield "", f"tokenizer `{manifest.parent.tokenizer}`"
    for adapter in manifest.adapters:
        yield "merged", f"{adapter.name}, rank {adapter.rank}, `{adapter.digest}`"
        if adapter.initial:
            yield "", f"less what it started from, `{adapter.initial}`"
    if manifest.training_base != "stored":
        yield "trained on", _TRAINED_ON[manifest.training_base]
    yield "scheme", scheme(manifest)
    yield "recipe", ", ".join(f"{key} {value}" for key, value in manifest.recipe.items())
    used = manifest.calibration
    yield (
        "calibration",
        f"{used.samples} rows ({used.origin}), {used.tokens:,} tokens, `{used.digest}`",
    )
    if neglected := sum(layer.routed == 0 for layer in manifest.layers):
        yield "neglected", f"{neglected} layers of experts that no calibration token was given to"
    if manifest.layers:
        worst = max(manifest.layers, key=lambda layer: layer.loss)
        yield (
            "layers",
            f"{len(manifest.layers)}, losing {gain(manifest.layers):.3f} of what plain rounding"
            f" loses; worst `{worst.name}` ({worst.loss:.2e} of its output)",
        )
    versions = ", ".join(f"{name} {number}" for name, number in manifest.versions.items())
    yield "made", f"{manifest.created:%Y-%m-%d} by quantserve {manifest.quantserve} ({versions})"


def _fidelity(found: Fidelity | None) -> Iterator[str]:
    if found is None:
        yield "Not measured yet: `quantserve compare PARENT ARTIFACT` measures it."
        return
    yield (
        f"Against the parent, both computed in float32, on {found.measured:%Y-%m-%d}; intervals"
        " are 95% of a paired bootstrap.\n"
    )
    if found.text is not None:
        yield f"{_plain(text_title(found.text))}:\n"
        yield from _figures(text_rows(found.text))
    for quiz in found.choices:
        yield f"\n{_plain(choice_title(quiz))}:\n"
        yield from _figures(choice_rows(quiz))


def _figures(rows: Iterator[Row]) -> Iterator[str]:
    return _table(("", "figure", "95% interval"), rows)


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(map(_plain, row))} |"


def _plain(cell: str) -> str:
    """No text of the user's ends a cell or a line."""
    return cell.replace("\n", " ").replace("|", "\\|")


def _serving(name: str) -> Iterator[str]:
    yield "```"
    yield f"quantserve serve ./{name}   # any x86 CPU with AVX2, or CUDA"
    yield f"vllm serve ./{name}         # stock vLLM loads the folder as it is"
    yield "```\n"
    yield (
        "Both answer the OpenAI API. `quantserve inspect --layers --verify` shows each layer's loss"
        " and holds every file against its digest. The parent's licence applies."
    )
