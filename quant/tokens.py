"""How a text or a chat becomes token ids: exactly as the server that will run the model does it."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.tokenization_mistral_common import MistralCommonBackend

from quant import content_format, conversation, foreign_json
from quant.conversation import Chat, Message
from quant.errors import CalibrationError, SourceError, TemplateRefusal
from quant.lora import cell
from quant.solver import heap

# Some templates print today's date: the same seed must give the same tokens.
_TODAY = datetime.date(2026, 1, 1)
# Files of a model that sees, whose processor may bring a template of its own.
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_PROCESSORS_TEMPLATE = "chat_template.json"
_LEAST_CUT = 4096  # characters
_A_TOKEN = 8  # characters that few tokens are longer than
_BEYOND = 8  # a second cut, this part further on, tells which tokens the first one changed


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's, with the chat template that a server takes. SourceError where it is broken."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False
        )
        if (template := _processors_template(folder)) is not None:
            tokenizer.chat_template = _beside(template, tokenizer.chat_template)
    except (OSError, ValueError, KeyError) as fault:
        reason = " ".join(str(fault).split())[:200]
        raise SourceError(f"{folder} has no tokenizer that can be read: {reason}") from fault
    heap.give_back()  # what built it leaves twice as much in holes: 300 MB for 262,144 tokens
    for template in _templates(tokenizer):
        if (why := cell.broken(template)) is not None:
            raise SourceError(f"{folder}: its chat template: {why}; mend it or take it out")
    return tokenizer


def _templates(tokenizer: PreTrainedTokenizerBase) -> Iterable[str]:
    own = tokenizer.chat_template
    return own.values() if isinstance(own, dict) else filter(None, [own])


def of_text(text: str, tokenizer: PreTrainedTokenizerBase, most: int | None = None) -> list[int]:
    """With BOS and EOS where the tokenizer adds them; no more than the first `most`."""
    return _ids(text, tokenizer, most, specials=True)


def of_chat(
    turns: Sequence[Message] | Chat,
    tokenizer: PreTrainedTokenizerBase,
    *,
    asks: bool,
    most: int | None = None,
) -> list[int]:
    """Through the chat template, which writes BOS itself; `asks` opens the answer's turn.

    Without a template, the turns' contents one under the other; mistral-common needs none. No more
    than the first `most`. TemplateRefusal for turns that are not taken.
    """
    chat = turns if isinstance(turns, Chat) else Chat(turns)
    if _is_mistrals(tokenizer):
        return _by_mistral(chat, tokenizer)[:most]
    if tokenizer.chat_template is None:
        said = (turn["content"] for turn in conversation.shown(chat.messages, "string", ""))
        return of_text("".join(f"{content}\n" for content in said), tokenizer, most)
    text: str = applied(chat, tokenizer, asks=asks, tokenize=False)
    return _ids(text, tokenizer, most, specials=False)


def applied(chat: Chat, tokenizer: PreTrainedTokenizerBase, *, asks: bool, **settings: Any) -> Any:
    """What transformers' `apply_chat_template` makes of a chat, given what vLLM would give it.

    `settings` are transformers' own. TemplateRefusal.
    """
    # vLLM takes these two values for nothing said.
    variables = {key: v for key, v in chat.variables.items() if v is not None and v != "auto"}
    given = {"documents": chat.documents, "strftime_now": _TODAY.strftime, **variables}
    try:
        template = template_of(chat, tokenizer)
        form = content_format.read_by(template)
        return tokenizer.apply_chat_template(
            conversation.shown(chat.messages, form, template),
            tools=conversation.functions(chat.tools),
            chat_template=template,
            add_generation_prompt=asks,
            **given,
            **settings,
        )
    except (
        jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError,
        RecursionError,
    ) as fault:  # fmt: skip # whatever a template's expressions may raise
        raise TemplateRefusal(" ".join(str(fault).split())[:300] or repr(fault)) from fault


def writes_chats(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it tells turns apart at all."""
    return tokenizer.chat_template is not None or _is_mistrals(tokenizer)


def template_of(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> str:
    """Of several, the one that a server takes for the chat. ValueError where there is none."""
    found: str = tokenizer.get_chat_template(None, tools=conversation.functions(chat.tools))
    return found


def check_vocabulary(ids: Iterable[int], size: int) -> None:
    """CalibrationError where a token is beyond a model's `size` embeddings."""
    highest = max(ids, default=0)
    if highest >= size:
        raise CalibrationError(
            f"token {highest} is beyond the model's vocabulary of {size}: the tokenizer is another"
            " model's"
        )


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin alike with."""
    pairs = zip(one, other, strict=False)
    differs = (place for place, (a, b) in enumerate(pairs) if a != b)
    return next(differs, min(len(one), len(other)))


def _ids(
    text: str, tokenizer: PreTrainedTokenizerBase, most: int | None, *, specials: bool
) -> list[int]:
    """Of a text that is much longer than `most` tokens, only a beginning is read.

    A cut changes tokens near it, and how many depends on the tokenizer: those that two cuts agree
    on are those of the whole text.
    """

    def encoded(part: str) -> list[int]:
        # Not verbose: we cut long texts into rows, so a warning about their length would mislead.
        ids: list[int] = tokenizer(part, add_special_tokens=specials, verbose=False)["input_ids"]
        return ids

    if most is None:
        return encoded(text)
    near = max(_LEAST_CUT, _A_TOKEN * most)
    while (far := near + near // _BEYOND) < len(text):
        ids = encoded(text[:far])
        if common(encoded(text[:near]), ids) >= most:
            return ids[:most]
        near *= 2
    return encoded(text)[:most]


def _is_mistrals(tokenizer: PreTrainedTokenizerBase) -> bool:
    return isinstance(tokenizer, MistralCommonBackend)


def _by_mistral(chat: Chat, tokenizer: MistralCommonBackend) -> list[int]:
    """As vLLM has mistral-common write it: from the messages as they came.

    An answer at the end is left open, since nothing else may be there in what a server is asked.
    """
    from mistral_common.exceptions import MistralCommonException  # noqa: PLC0415 # if installed

    answered = chat.messages[-1]["role"] == "assistant"
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            [dict(message) for message in chat.messages],
            tools=conversation.functions(chat.tools),
            continue_final_message=answered,
            return_dict=False,
        )
    except (MistralCommonException, AssertionError, ValueError, TypeError, LookupError) as fault:
        raise TemplateRefusal(" ".join(str(fault).split())[:300] or repr(fault)) from fault
    return ids


def _processors_template(folder: Path) -> str | None:
    """What a processor of older transformers keeps beside the tokenizer's own."""
    file = folder / _PROCESSORS_TEMPLATE
    if not file.is_file() or not any((folder / name).is_file() for name in _PROCESSORS):
        return None
    told = foreign_json.loads(file.read_bytes())
    template = told.get("chat_template") if isinstance(told, dict) else None
    return template if isinstance(template, str) else None


def _beside(processors: str, own: Any) -> str | dict[str, str]:
    """vLLM takes the processor's template, and the tokenizer's where there are tools."""
    if own is None:
        return processors
    named = own if isinstance(own, dict) else {"default": own}
    with_tools = named.get("tool_use", named.get("default", processors))
    return {**named, "default": processors, "tool_use": with_tools}
