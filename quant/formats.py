"""How the weight of one linear layer is stored, and how config.json says which layer is how.

Owns `quantization_config`: uniform, or with rules that single out layers (`dynamic` for gptq,
`ignore` for compressed-tensors), and reads it back the way stock vLLM does. Refuses sections that
this program does not write. Standard library only: a server reads it too.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quant.errors import ArtifactError
from quant.recipe import Scheme

# Layers that vLLM loads as one, under a name of its own. It looks a gptq rule up by that name only,
# so that a rule has to match it beside the parts', which is what others look for.
_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "kv_proj": ("k_proj", "v_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
    "w13": ("w1", "w3"),
}


_EXPERT = re.compile(r"(.*\.experts)\.\d+\.[^.]+$")
_BLOCK = re.compile(r"\.(\d+)\.")  # between the list of blocks and what lies inside one


@dataclass(frozen=True, slots=True, order=True)
class Format:
    """Of one layer: `bits` of a weight, 16 for one left as it is; `group` inputs share a scale,
    -1 all of a row; `inputs` is 8 where activations are rounded to int8 too."""

    bits: int
    group: int = -1
    inputs: int = 16

    def payload(self, shape: tuple[int, int]) -> int:
        """Bytes of weights, scales and zero points of a layer (out, in), as a server holds them."""
        rows, columns = shape
        if self.bits == 16:
            return 2 * rows * columns
        if self.inputs == 8:
            return rows * columns + 4 * rows
        groups = 1 if self.group < 0 else columns // self.group
        return rows * columns * self.bits // 8 + groups * rows * (16 + self.bits) // 8

    def stored(self, shape: tuple[int, int]) -> int:
        """Bytes on disk: gptq also has an int32 per input, its group, that vLLM does not load."""
        indexed = self.bits < 16 and self.inputs == 16
        return self.payload(shape) + 4 * shape[1] * indexed

    def holds(self, shape: tuple[int, int]) -> bool:
        """Whether a layer (out, in) can be stored so: its group divides the inputs, and gptq's
        codes, packed along the inputs, and zero points, along the outputs, fill 32-bit words."""
        rows, columns = shape
        if self.bits == 16 or self.inputs == 8:
            return True
        per_word = 32 // self.bits
        odd = rows % per_word or columns % per_word or (self.group > 0 and columns % self.group)
        return not odd

    def grouping(self) -> str:
        return "per channel" if self.group < 0 else f"groups of {self.group}"

    def __str__(self) -> str:
        if self.bits == 16:
            return "full precision"
        return f"{self.bits}-bit {self.grouping()}"


FULL = Format(16)
INT8 = Format(8, inputs=8)

Plan = Mapping[str, Format]  # of every linear layer in the blocks, by full name
Shapes = Mapping[str, tuple[int, int]]


def of_scheme(scheme: Scheme, group: int) -> Format:
    """What every layer of a scheme has when nothing else is asked for."""
    return INT8 if scheme == "w8a8" else Format(4 if scheme == "w4a16" else 8, group)


def siblings(names: Iterable[str]) -> list[list[str]]:
    """Layers that a server loads as one, together, for they read the same input; others alone."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        fused = next((whole for whole, parts in _FUSED.items() if leaf in parts), leaf)
        found.setdefault((parent, fused), []).append(name)
    return list(found.values())


def mixture(name: str) -> str | None:
    """The module of all experts that the layer `name` is a part of; None of any other layer."""
    found = _EXPERT.match(name)
    return found[1] if found else None


def loaded_as_one(names: Iterable[str]) -> list[list[str]]:
    """Layers that a server loads as one and has one format for: siblings, and all of a mixture."""
    found: dict[str, list[str]] = {}
    for together in siblings(names):
        found.setdefault(mixture(together[0]) or together[0], []).extend(together)
    return list(found.values())


def part(name: str, shape: tuple[int, int]) -> tuple[int, int]:
    """The shape of each of the two that a fused layer's file holds, gate above up: a server takes
    them apart. Of any other layer its own."""
    two = name.rpartition(".")[2] in ("gate_up_proj", "w13")
    return (shape[0] // 2, shape[1]) if two else shape


def shared_widths(shapes: Shapes) -> dict[str, int]:
    """The inputs of each layer that groups must divide: of all experts' layers at once, for a
    server loads a mixture as one and has one format for it."""
    widths: dict[str, int] = {}
    for name, (_, columns) in shapes.items():
        home = mixture(name) or name
        widths[home] = math.gcd(widths.get(home, columns), columns)
    return {name: widths[mixture(name) or name] for name in shapes}


def bits_per_weight(plan: Plan, shapes: Shapes) -> float:
    """Of the layers in the plan together, scales and zero points included."""
    payload = sum(form.payload(shapes[name]) for name, form in plan.items())
    return 8 * payload / sum(shapes[name][0] * shapes[name][1] for name in plan)


def most_common(scheme: Scheme, plan: Plan) -> Format:
    """What most quantized layers have; INT8 or four bits a channel where none is quantized."""
    counted = Counter(form for form in plan.values() if form != FULL)
    # Ties go to the smallest, whatever order the layers came in.
    return min(counted, key=lambda form: (-counted[form], form), default=of_scheme(scheme, -1))


def listed(forms: Iterable[Format]) -> str:
    """How many layers have which format, in words."""
    counted = Counter(forms)
    return ", ".join(
        f"{count} layer{'s' * (count > 1)} {form}" for form, count in sorted(counted.items())
    )


def section(
    scheme: Scheme, plan: Plan, towers: Sequence[str] = (), drafts: Sequence[str] = ()
) -> dict[str, Any]:
    """The `quantization_config` of a plan; every key is one that vLLM reads.

    `towers` are parts of the model, by name, that stay as they are: vision beside language.
    `drafts` are where layers lie that the model's own code does not run, and that stay, too: those
    that predict further tokens.
    """
    base = most_common(scheme, plan)
    beside = [rf"(?:.*\.)?(?:{'|'.join(map(re.escape, towers))})\."] if towers else []
    beside += [_beyond(plan, drafts)] if drafts else []
    if scheme == "w8a8":
        full = sorted(name for name, form in plan.items() if form == FULL)
        parts = [part for name in full for part in _parts(name)]
        kept = [f"re:{pattern}" for pattern in beside]
        return _INT8_SECTION | {"ignore": ["lm_head", *kept, *full, *parts]}
    others = {name: form for name, form in plan.items() if form != base}
    rules: dict[str, dict[str, int]] = {f"-:{pattern}": {} for pattern in beside}
    rules |= _rules(others, anywhere=bool(towers))
    return (
        {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": base.bits,
            "group_size": base.group,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
        }
        | ({"dynamic": rules} if rules else {})
        | _fused_in_files(plan)
    )


def of_layer(told: Mapping[str, Any], name: str) -> Format:
    """What `told`, a `quantization_config`, says of a layer, by its own name or a fused one.

    ArtifactError where it is none of ours.
    """
    method = told.get("quant_method"), told.get("format")
    if method == ("compressed-tensors", "int-quantized"):
        return FULL if any(_names(entry, name) for entry in told.get("ignore", ())) else INT8
    if method != ("gptq", None):
        raise ArtifactError(f"{' '.join(map(repr, method))} is no quantization this program writes")
    base = {key: told.get(key) for key in ("bits", "group_size")}
    for rule, changes in (told.get("dynamic") or {}).items():
        # The first rule that matches from the start of the name decides.
        if re.match(rule.removeprefix("-:").removeprefix("+:"), name):
            if rule.startswith("-:"):
                return FULL
            base |= changes
            break
    bits, group = base["bits"], base["group_size"]
    if bits not in (4, 8) or not isinstance(group, int):
        raise ArtifactError(f"{name} would have {bits!r} bits in groups of {group!r}")
    return Format(bits, group)


def _names(entry: str, name: str) -> bool:
    """Whether an entry of `ignore` means this layer."""
    return bool(re.match(entry[3:], name)) if entry.startswith("re:") else entry == name


def _beyond(plan: Plan, drafts: Sequence[str]) -> str:
    """A pattern of what lies in `drafts`, or in blocks of a higher number than the plan has.

    vLLM gives the layers that predict further tokens such numbers, whatever their files say.
    """
    blocks, places = "", set()
    for name in plan:
        blocks, place, _ = _BLOCK.split(name, maxsplit=1)
        places.add(int(place))
    numbers = "|".join(map(str, sorted(places)))
    among = rf"{blocks.rpartition('.')[2]}\.(?!(?:{numbers})\.)\d+"
    ends = {name.rpartition(".")[2] for name in drafts if not name.startswith(f"{blocks}.")}
    return rf"(?:.*\.)?(?:{'|'.join([*map(re.escape, sorted(ends)), among])})(?:\.|$)"


def _fused_in_files(plan: Plan) -> dict[str, list[list[str]]]:
    """Names all quantized layers of a block where some lie in the files as vLLM loads them.

    It looks for the parts of such a layer otherwise, finds none, and takes it for one that is not
    quantized.
    """
    inside = {_BLOCK.split(name, maxsplit=1)[2] for name, form in plan.items() if form != FULL}
    parts = {part for name in inside for part in _parts(name)}
    return {"modules_in_block_to_quantize": [sorted(inside | parts)]} if parts else {}


def _parts(name: str) -> list[str]:
    """What a layer that lies fused in the files would be apart."""
    home, dot, leaf = name.rpartition(".")
    return [f"{home}{dot}{part}" for part in _FUSED.get(leaf, ())]


def _rules(plan: Plan, *, anywhere: bool) -> Iterator[tuple[str, dict[str, int]]]:
    """A rule for each format and set of siblings, all blocks where they have it in one pattern.

    `anywhere` leaves open what stands before the list of blocks: servers move a language model
    that stands behind a vision tower, or in a place of its own, and look rules up by their name
    for it.
    """
    siblings: dict[tuple[str, str, str, Format], set[str]] = defaultdict(set)
    for name, form in plan.items():
        blocks, place, inside = _BLOCK.split(name, maxsplit=1)
        parent, _, leaf = f".{inside}".rpartition(".")
        home = mixture(f".{inside}") or f"{parent}."
        siblings[blocks, place, home, form].add(leaf)
    places: dict[tuple[str, str, str, Format], list[str]] = defaultdict(list)
    for (blocks, place, parent, form), leaves in siblings.items():
        places[blocks, parent, "|".join(sorted(leaves | _fused(leaves))), form].append(place)
    for (blocks, parent, choice, form), found in places.items():
        numbers = "|".join(sorted(found, key=int))
        free = anywhere or blocks != "model.layers"
        start = rf"(?:.*\.)?{blocks.rpartition('.')[2]}" if free else re.escape(blocks)
        # vLLM looks for a mixture as a whole, others for each layer of each expert.
        inner = rf"(?:{choice})" if parent.endswith(".") else rf"(?:\.\d+\.(?:{choice}))?"
        pattern = rf"{start}\.(?:{numbers}){re.escape(parent)}{inner}$"
        if form == FULL:
            yield f"-:{pattern}", {}
        else:
            yield f"+:{pattern}", {"bits": form.bits, "group_size": form.group}


def _fused(leaves: set[str]) -> set[str]:
    return {name for name, parts in _FUSED.items() if leaves.issuperset(parts)}


_INT8_SECTION: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "channel",
                "dynamic": False,
            },
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
            "output_activations": None,
        }
    },
}
