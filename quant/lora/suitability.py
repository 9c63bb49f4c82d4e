"""What an adapter is, and which paths are open to it: merging, and serving beside its base.

Says about every closed path why, and which one is open.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from quant.errors import AdapterError
from quant.lora import adapter as lora
from quant.lora import (
    anatomy,
    fitting,
    footing,
    obstacles,
    placement,
    served,
    soft_prompt,
    starts,
    voice,
)
from quant.lora.adapter import Adapter
from quant.lora.footing import Base
from quant.lora.lora_parts import NESTED
from quant.lora.obstacles import Obstacle
from quant.lora.soft_prompt import SoftPrompt


class Verdict(BaseModel):
    """Whether a path is open, and under which condition, or why not."""

    model_config = ConfigDict(frozen=True)

    works: bool
    reason: str


class Suitability(BaseModel):
    """An adapter told in a few lines; `targets` counts modules by the last part of their names.

    `travels` is what is served with it beside weights, `ignored` what its generation config asks
    for in vain.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    digest: str
    variant: tuple[str, ...]
    ranks: tuple[int, ...]
    scaling: tuple[float, ...]
    targets: dict[str, int]
    bytes: int
    base_named: str | None
    base_weights: str | None
    travels: tuple[str, ...]
    ignored: tuple[str, ...]
    merge: Verdict
    swap: Verdict

    @property
    def usable(self) -> bool:
        return self.merge.works or self.swap.works


def judge(folder: Path, against: Path | None, cache: Path | None = None) -> Suitability:
    """AdapterError where the folder is no adapter; SourceError or ArtifactError where `against`
    is neither a model as `quantize` takes it nor quantized."""
    base = footing.base_of(against, cache) if against is not None else None
    if soft_prompt.is_one(folder):
        return _judge_soft(soft_prompt.read(folder), base)
    adapter = lora.read_trained(folder)
    tails = Counter(
        module.replace(NESTED, "").rpartition(".")[2]
        for module in (*adapter.pairs, *adapter.parts.stacked)
    )
    pairs = (*adapter.pairs.values(), *adapter.parts.stacked.values())
    return Suitability(
        name=adapter.name,
        digest=adapter.digest,
        variant=_variant(adapter),
        ranks=tuple(sorted({pair.rank for pair in pairs})),
        scaling=tuple(sorted({pair.scale for pair in pairs})),
        targets=dict(sorted(tails.items())),
        bytes=adapter.weights.stat().st_size,
        base_named=adapter.config.base_model_name_or_path,
        base_weights=adapter.base_fingerprint,
        travels=adapter.voice.told(),
        ignored=adapter.voice.ignored,
        merge=_merging(adapter, base),
        swap=_swapping(adapter, base),
    )


def _judge_soft(found: SoftPrompt, base: Base | None) -> Suitability:
    return Suitability(
        name=found.folder.name,
        digest=found.digest,
        variant=(f"{found.kind.lower().replace('_', '-')}, {found.tokens} virtual tokens",),
        ranks=(),
        scaling=(),
        targets={},
        bytes=found.bytes,
        base_named=found.base_named,
        base_weights=found.base_fingerprint,
        travels=found.voice.told(),
        ignored=found.voice.ignored,
        merge=Verdict(works=False, reason="virtual tokens are no change of any weight"),
        swap=_softly(found, base),
    )


def _softly(found: SoftPrompt, base: Base | None) -> Verdict:
    known = None
    try:
        if base is not None:
            width = base.config.get_text_config().hidden_size
            soft_prompt.validate(found, width, _base_weights(base, found.base_fingerprint))
            known = voice.vocabulary(base.folder)
        fitting.fitted(found.voice, known, found.folder)
    except AdapterError as fault:
        return Verdict(works=False, reason=str(fault))
    return Verdict(works=True, reason="as it is (on CUDA with --prompt-tuning)")


def _variant(adapter: Adapter) -> tuple[str, ...]:
    config, parts = adapter.config, adapter.parts
    found = {
        "rsLoRA": config.use_rslora,
        "DoRA": config.use_dora,
        "rank_pattern": bool(config.rank_pattern),
        "alpha_pattern": bool(config.alpha_pattern),
        "target_parameters": bool(config.target_parameters),
        "fan_in_fan_out": config.fan_in_fan_out,
        f"start {config.start}": config.start is not None,
        "saved modules": bool(parts.whole),
        "retrained tokens": bool(parts.rows),
        "embedding": any(pair.embedding for pair in parts.pairs.values()),
        "biases": config.bias != "none" or bool(parts.offsets),
    }
    return tuple(name for name, there in found.items() if there) or ("plain LoRA",)


def _merging(adapter: Adapter, base: Base | None) -> Verdict:
    start = starts.why_not(adapter, has_base=True)
    if start is not None:
        return Verdict(
            works=True,
            reason=f"into the base that training left (--training-base residual): {start}",
        )
    if base is None:
        return Verdict(works=True, reason="in float32")
    try:
        return _merging_into(adapter, base)
    except AdapterError as fault:
        return Verdict(works=False, reason=str(fault))


def _merging_into(adapter: Adapter, base: Base) -> Verdict:
    if base.quantized:
        return Verdict(
            works=False,
            reason=f"{base.folder} is quantized: merge into what it was made from, and quantize"
            " that",
        )
    shapes = {name: header.shape for name, header in base.headers.items()}
    parts = anatomy.of(base.config, shapes)
    placed = placement.placed(adapter, parts.names)
    if adapter.base_fingerprint is not None:
        lora.check_lineage(adapter, base.parent.weights)
    found = anatomy.plan(parts, shapes, [placed])
    extra = "; the head parts from the embedding" * found.untie
    if found.vocabulary is not None:
        extra += f"; the vocabulary becomes {found.vocabulary}"
    return Verdict(works=True, reason=f"in float32{extra}")


def _swapping(adapter: Adapter, base: Base | None) -> Verdict:
    found = obstacles.to_serving(adapter.config, adapter.parts)
    blocked = [obstacle for obstacle in found if obstacle.remedy == "merge"]
    if blocked:
        reasons = "; ".join(obstacle.reason for obstacle in blocked)
        return Verdict(works=False, reason=f"{reasons}: use `quantserve adapter merge`")
    try:
        full = base is not None and not base.quantized
        if (start := starts.why_not(adapter, has_base=full)) is not None:
            return Verdict(works=False, reason=f"{start}: give --base, or use `adapter merge`")
        if base is not None:
            shapes, named = base.shapes(), adapter.pairs.keys()
            adapter = placement.beside(adapter, base.config, shapes)
            if other := sorted(adapter.pairs.keys() - named):
                reason = f"the base has other names for its layers, as {other[0]}"
                found.append(Obstacle("target_modules", reason, "export"))
            _check_base(adapter, base, shapes)
        adapted = served.ANYWHERE if base is None else served.targets(base.folder)
        served.check(adapter.folder, adapter.pairs, adapted)
        known = voice.vocabulary(base.folder) if base is not None else None
        fitting.fitted(adapter.voice, known, adapter.folder)
    except AdapterError as fault:
        return Verdict(works=False, reason=str(fault))
    doubled = 2 if adapter.config.start is not None else 1
    rank = adapter.rank * doubled
    limit = obstacles.served_rank(rank)
    if limit is None:
        return Verdict(works=False, reason=f"rank {rank}: vLLM serves up to {obstacles.RANKS[-1]}")
    needs = f", with --max-lora-rank {limit}" if limit > obstacles.RANKS[0] else ""
    if found:
        reasons = "; ".join(obstacle.reason for obstacle in found)
        return Verdict(works=True, reason=f"after `quantserve adapter export`{needs}: {reasons}")
    return Verdict(works=True, reason=f"as it is{needs}")


def _check_base(adapter: Adapter, base: Base, shapes: Mapping[str, tuple[int, int]]) -> None:
    lora.validate(
        adapter,
        shapes,
        max_rank=None,
        base_weights_fingerprint=_base_weights(base, adapter.base_fingerprint),
        base_artifact=base.artifact,
    )
    lora.units(base.folder, base.manifest)


def _base_weights(base: Base, named: str | None) -> str | None:
    """The base's fingerprint; of a folder without a manifest only where an adapter names one."""
    return base.parent.weights if base.manifest is not None or named is not None else None
