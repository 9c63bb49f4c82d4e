"""What travels with an adapter beside its weights: chat template, generation defaults, tokens.

A trainer leaves them in the adapter's folder as transformers writes them. The template is somebody
else's program: here it is text, and `quant.lora.cell` runs it. Tokens cannot be added to a base
that is being served, so those which an adapter speaks with must be the base's own.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, ValidationError

from quant import companions
from quant.errors import AdapterError
from quant.lora.folder import MAX_JSON, check_size, read_json

TEMPLATE = "chat_template.jinja"
# By the names that vLLM and transformers choose by.
TEMPLATE_FILES = {"default": TEMPLATE, "tool_use": f"{companions.TEMPLATES}/tool_use.jinja"}
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION = companions.GENERATION
SPECIAL = "special_tokens_map.json"
ADDED = "added_tokens.json"
TOKENIZER = "tokenizer.json"
# Every file that is looked at, and the most bytes it may have.
FILES = {
    **dict.fromkeys(TEMPLATE_FILES.values(), 256 << 10), GENERATION: 1 << 20, SPECIAL: 1 << 20,
    ADDED: MAX_JSON, TOKENIZER_CONFIG: MAX_JSON, TOKENIZER: 64 << 20,
}  # fmt: skip
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
                "mask_token")  # fmt: skip
_UNSPOKEN = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")  # by no chat
_SHOWN = 4  # tokens named in a refusal
# How a generation config says what it is, not what it asks for.
_SILENT = frozenset({
    "bos_token_id", "do_sample", "max_length", "pad_token_id", "transformers_version", "use_cache",
    "_from_model_config", "cache_implementation", "output_attentions", "output_hidden_states",
    "return_dict_in_generate",
})  # fmt: skip


def _listed(value: Any) -> Any:
    return [] if value is None else value if isinstance(value, list) else [value]


_ONE_OR_MORE = BeforeValidator(_listed)
LONGEST_STOP, MOST_STOPS, MOST_EOS = 256, 64, 256
_Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
_Token = Annotated[int, Field(ge=0, lt=1 << 31)]


class _Generation(BaseModel):
    """The fields of generation_config.json that a server can fill in for a client.

    The engine computes with 32 bits, and checks most of this again where it can only end.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    temperature: FiniteFloat | None = Field(None, ge=0, le=2)
    top_p: FiniteFloat | None = Field(None, ge=1e-6, le=1)
    top_k: int | None = Field(None, ge=-1, lt=1 << 31)
    min_p: FiniteFloat | None = Field(None, ge=0, le=1)
    repetition_penalty: FiniteFloat | None = Field(None, ge=0.01, le=100)
    presence_penalty: FiniteFloat | None = Field(None, ge=-2, le=2)
    frequency_penalty: FiniteFloat | None = Field(None, ge=-2, le=2)
    max_new_tokens: int | None = Field(None, ge=1, lt=1 << 31)
    eos_token_id: Annotated[list[_Token], _ONE_OR_MORE, Field(max_length=MOST_EOS)] = []
    stop_strings: Annotated[list[_Stop], _ONE_OR_MORE, Field(max_length=MOST_STOPS)] = []


@dataclass(frozen=True, slots=True)
class Voice:
    """An adapter's own settings; `added` are the tokens its tokenizer lists, by id.

    `lists`: its template wants a message's content as a list of parts (`fitted` finds out).
    """

    templates: Mapping[str, str] = field(default_factory=dict)
    tokens: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, float] = field(default_factory=dict)  # by vLLM's names
    stop: tuple[str, ...] = ()
    eos: tuple[int, ...] = ()
    added: Mapping[str, int] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    lists: bool = False

    def identity(self) -> bytes:
        """What two equal voices have in common; empty where an adapter has none."""
        own = [self.templates, self.tokens, self.defaults, self.stop, self.eos]
        return json.dumps(own, sort_keys=True).encode() if any(own) else b""

    def template(self, *, tools: bool) -> str | None:
        """The chat template for a request with or without tools."""
        default = self.templates.get("default")
        return self.templates.get("tool_use", default) if tools else default

    def told(self) -> tuple[str, ...]:
        """What travels, a phrase each."""
        templates = [f"chat template{'' if n == 'default' else f' {n}'}" for n in self.templates]
        defaults = [f"{name} {value:g}" for name, value in self.defaults.items()]
        stops = [f"stops at {text!r}" for text in self.stop]
        stops += [f"stops at token {number}" for number in self.eos]
        return (*templates, *defaults, *stops)


def read(folder: Path) -> Voice:
    """What lies in an adapter's folder; AdapterError names the file at fault."""
    for name, most in FILES.items():
        if (folder / name).is_file():
            check_size(folder / name, most)
    config = _optional(folder / TOKENIZER_CONFIG)
    special = {**_optional(folder / SPECIAL), **config}
    generation = _optional(folder / GENERATION)
    asked = _generation(folder / GENERATION, generation)
    numbers = asked.model_dump(exclude={"eos_token_id", "stop_strings"}, exclude_none=True)
    if "max_new_tokens" in numbers:
        numbers["max_tokens"] = numbers.pop("max_new_tokens")
    found = Voice(
        templates=_templates(folder, config.get("chat_template")),
        tokens={n: text for n in NAMED_TOKENS if (text := _content(special.get(n)))},
        defaults=numbers,
        stop=tuple(asked.stop_strings),
        eos=tuple(asked.eos_token_id),
        added=_added(folder, config),
        ignored=tuple(sorted(_ignored(generation))),
    )
    _check_texts(found, folder)
    return found


def vocabulary(base: Path) -> Mapping[str, int] | None:
    """Every token of a base by its text; None where it has no tokenizer.json to tell."""
    if not (base / TOKENIZER).is_file():
        return None
    raw = read_json(base / TOKENIZER, FILES[TOKENIZER])
    model = raw.get("model")
    stored = model.get("vocab") if isinstance(model, dict) else None
    known = dict(stored) if isinstance(stored, dict) else {}
    if isinstance(stored, list):  # Unigram: a piece and its score, in the order of ids
        known = {str(piece[0]): place for place, piece in enumerate(stored)}
    return known | _added(base, {})


def check_tokens(voice: Voice, known: Mapping[str, int], folder: Path) -> None:
    """AdapterError where the adapter speaks with tokens that the base does not have.

    A padding token may be new: nothing pads while serving.
    """
    silent = {voice.tokens.get(name) for name in _UNSPOKEN}
    silent -= {voice.tokens.get(name) for name in ("bos_token", "eos_token")}
    spoken = {text: number for text, number in voice.added.items() if text not in silent}
    named = [t for n, t in voice.tokens.items() if n not in _UNSPOKEN and t not in known]
    wrong = sorted({text for text, n in spoken.items() if known.get(text) != n} | set(named))
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        listed = ", ".join(repr(text) for text in wrong[:_SHOWN])
        raise AdapterError(
            f"{folder} cannot be served beside its base: its tokenizer has {listed}{more}, which"
            " the base's has not, or under another number, and a base being served cannot be"
            " taught tokens; use `quantserve adapter merge`, which brings the tokenizer along",
            field=TOKENIZER,
            expected="the base's tokens",
            found=listed,
        )
    if voice.eos and not set(voice.eos) <= set(known.values()):
        raise AdapterError(
            f"{folder / GENERATION}: eos_token_id {list(voice.eos)} is no token of the base",
            field="eos_token_id",
        )


def stop_ids(voice: Voice, known: Mapping[str, int]) -> tuple[int, ...]:
    """The tokens that end an answer, beside the base's own: by number, and the named EOS."""
    named = known.get(voice.tokens.get("eos_token", ""))
    return tuple(dict.fromkeys((*voice.eos, *(() if named is None else (named,)))))


def _check_texts(own: Voice, folder: Path) -> None:
    """AdapterError for half a surrogate pair, which JSON can spell and no message can carry."""
    for text in (*own.templates.values(), *own.tokens.values(), *own.stop, *own.added):
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise AdapterError(f"{folder}: {text[:40]!r} is no Unicode text", field=GENERATION)


def _templates(folder: Path, configured: object) -> dict[str, str]:
    """Files of templates before what tokenizer_config.json says, as transformers reads them."""
    found = {}
    if isinstance(configured, str):
        found = {"default": configured}
    elif isinstance(configured, list):
        pairs = [(e.get("name"), e.get("template")) for e in configured if isinstance(e, dict)]
        found = {n: t for n, t in pairs if n in TEMPLATE_FILES and isinstance(t, str)}
    elif configured is not None:
        raise AdapterError(
            f"{folder / TOKENIZER_CONFIG}: chat_template is no text", field="chat_template"
        )
    for name, file in TEMPLATE_FILES.items():
        if (folder / file).is_file():
            found[name] = _text(folder / file)
    for text in found.values():
        if len(text) > FILES[TEMPLATE]:
            raise AdapterError(
                f"{folder}: a chat template of {len(text)} characters; at most {FILES[TEMPLATE]}",
                field="chat_template",
            )
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as fault:
        raise AdapterError(f"{path} is not UTF-8", field=path.name) from fault


def _generation(path: Path, raw: Mapping[str, Any]) -> _Generation:
    try:
        return _Generation.model_validate(raw)
    except ValidationError as fault:
        first = fault.errors(include_url=False)[0]
        name = str(first["loc"][0])
        raise AdapterError(
            f"{path}: {name}: {first['msg']}", field=name, found=repr(first["input"])[:100]
        ) from fault


def _ignored(raw: Mapping[str, Any]) -> Iterable[str]:
    known = {*_Generation.model_fields, *_SILENT}
    return (name for name, value in raw.items() if name not in known and value is not None)


def _added(folder: Path, config: Mapping[str, Any]) -> dict[str, int]:
    """Tokens outside a tokenizer's model, as each release of transformers has stored them."""
    found: dict[str, int] = {}
    for text, number in _optional(folder / ADDED).items():
        found[text] = _number(number, folder / ADDED)
    decoder = config.get("added_tokens_decoder")
    for number, token in decoder.items() if isinstance(decoder, dict) else ():
        if text := _content(token):
            found[text] = _number(number, folder / TOKENIZER_CONFIG)
    tokens = _optional(folder / TOKENIZER, FILES[TOKENIZER]).get("added_tokens")
    for token in tokens if isinstance(tokens, list) else ():
        if isinstance(token, dict) and (text := _content(token)):
            found[text] = _number(token.get("id"), folder / TOKENIZER)
    return found


def _number(raw: object, path: Path) -> int:
    if isinstance(raw, int) or (isinstance(raw, str) and raw.isdecimal() and len(raw) < 12):
        return int(raw)
    raise AdapterError(f"{path}: {raw!r} is no token's number", field=path.name)


def _content(token: object) -> str:
    """A token's text: plain, or as a saved AddedToken."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _optional(path: Path, most: int = MAX_JSON) -> dict[str, Any]:
    return read_json(path, most) if path.is_file() else {}
