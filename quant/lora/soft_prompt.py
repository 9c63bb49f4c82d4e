"""A PEFT prompt-tuning or p-tuning folder: virtual tokens that stand in front of every prompt.

PEFT saves what its prompt encoder makes of them (`prompt_embeddings` [virtual tokens, width]), so
that a p-tuned encoder is not needed any more. Standard library and pydantic only, as for LoRA.
"""

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quant.errors import AdapterError
from quant.lora import adapter, kinds, voice
from quant.lora.lora_parts import FLOATS
from quant.lora.voice import Voice

KEY = "prompt_embeddings"
LONGEST = 4096  # virtual tokens


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    num_virtual_tokens: int = Field(ge=1, le=LONGEST)
    base_model_name_or_path: str | None = None


@dataclass(frozen=True, slots=True)
class SoftPrompt:
    """`digest` is over configuration, weights and voice, as an `Adapter`'s is."""

    folder: Path
    kind: str  # PEFT's
    tokens: int
    width: int
    digest: str
    base_named: str | None
    base_fingerprint: str | None
    voice: Voice

    @property
    def bytes(self) -> int:
        return (self.folder / adapter.WEIGHTS).stat().st_size


def is_one(folder: Path) -> bool:
    """Whether adapter_config.json says so; AdapterError where there is none."""
    return adapter.config_of(folder).get("peft_type") in kinds.SOFT_PROMPTS


def read(folder: Path) -> SoftPrompt:
    """The virtual tokens of a folder, all bytes read once; AdapterError names what is wrong."""
    folder = folder.resolve()
    path, raw = folder / adapter.CONFIG, adapter.config_of(folder)
    kinds.check(path, raw, *kinds.SOFT_PROMPTS)
    try:
        config = _Config.model_validate(raw)
    except ValidationError as fault:
        first = fault.errors(include_url=False)[0]
        field = str(first["loc"][0])
        raise AdapterError(f"{path}: {field}: {first['msg']}", field=field) from fault
    headers = adapter.headers_of(folder)
    shape = headers[KEY].shape if KEY in headers else ()
    if set(headers) != {KEY} or len(shape) != 2 or headers[KEY].dtype not in FLOATS:
        raise AdapterError(
            f"{folder / adapter.WEIGHTS} holds {', '.join(sorted(headers)[:3])} {list(shape)}, and"
            f" should hold {KEY} [{config.num_virtual_tokens}, width] alone, of floats",
            field=KEY,
        )
    if shape[0] != config.num_virtual_tokens:
        raise AdapterError(
            f"{folder}: {shape[0]} virtual tokens, num_virtual_tokens says"
            f" {config.num_virtual_tokens}",
            field="num_virtual_tokens",
            expected=str(config.num_virtual_tokens),
            found=str(shape[0]),
        )
    own = voice.read(folder)
    return SoftPrompt(
        folder, str(raw["peft_type"]), shape[0], shape[1],
        adapter.digest_of(folder, headers, own.identity()), config.base_model_name_or_path,
        adapter.lineage(folder)[0], own,
    )  # fmt: skip


def validate(found: SoftPrompt, width: int | None, base_weights_fingerprint: str | None) -> None:
    """AdapterError for what does not fit a base whose embeddings are `width` wide."""
    named = found.base_fingerprint
    if named and base_weights_fingerprint and named != base_weights_fingerprint:
        raise _misfit(found, "base weights", base_weights_fingerprint[:12], named[:12])
    if found.width != width:
        raise _misfit(found, "width", str(width or "a base that says its width"), str(found.width))


def _misfit(found: SoftPrompt, field: str, expected: str, there: str) -> AdapterError:
    return AdapterError(
        f"adapter {found.folder} does not fit the base: {field}: expected {expected}, found"
        f" {there}",
        field=field,
        expected=expected,
        found=there,
    )
