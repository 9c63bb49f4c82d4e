"""Which tokens of a document an assistant wrote: those that a server lets the model write.

A template tells by `{% generation %}`. With any other, the conversation is rendered up to each
answer: from where it leaves the prompt that opens the answer, to the token that ends it. Refuses a
chat whose beginning is rendered otherwise once the rest is there: nothing tells where answers are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from quant import tokens
from quant.conversation import Chat
from quant.errors import TemplateRefusal
from quant.records import Document

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


def written(document: Document, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Every token of the document, and whether the assistant wrote it. TemplateRefusal.

    Of a text that was no answer to a prompt, none; nor of chats where there is no template.
    """
    if not isinstance(document, Chat):
        ids = tokens.of_text(document.text, tokenizer)
        asked = tokens.of_text(document.text[: document.prompt], tokenizer)
        start = tokens.common(asked, ids) if document.prompt else len(ids)
        return ids, [place >= start for place in range(len(ids))]
    ids = tokens.of_chat(document, tokenizer, asks=False)
    if not tokens.writes_chats(tokenizer):
        return ids, [False] * len(ids)
    marks = tokenizer.chat_template is not None
    if marks and _MARKED.search(tokens.template_of(document, tokenizer)):
        return _marked(document, tokenizer)
    own = [False] * len(ids)
    for start, end in _answers(document, tokenizer, ids):
        own[start:end] = [True] * (end - start)
    return ids, own


def _marked(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    made = tokens.applied(
        chat, tokenizer, asks=False, return_dict=True, return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},
    )  # fmt: skip
    return made["input_ids"], [bool(own) for own in made["assistant_masks"]]


def _answers(
    chat: Chat, tokenizer: PreTrainedTokenizerBase, ids: list[int]
) -> Iterator[tuple[int, int]]:
    """Where each answer begins and ends among the chat's tokens."""
    done = 0
    for place, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        start, limit = _bounds(chat, place, tokenizer, ids)
        # mistral-common leaves an answer open that is the last, and ends it with the next token.
        until = len(ids) if limit is None else min(limit + 1, len(ids))
        stops = (at + 1 for at in range(start, until) if ids[at] == tokenizer.eos_token_id)
        end = next(stops, limit)
        if end is None or start < done:
            raise TemplateRefusal(
                f"messages: {place}: the template writes this answer otherwise once others follow,"
                " so that its tokens cannot be told"
            )
        yield start, end
        done = end


def _bounds(
    chat: Chat, place: int, tokenizer: PreTrainedTokenizerBase, ids: list[int]
) -> tuple[int, int | None]:
    """Where a message begins behind the prompt that opens it; and where the next one does, unless
    the template then writes this one otherwise."""
    before: list[int] = []
    opened: list[int] = []
    if place:
        asked = replace(chat, messages=chat.messages[:place])
        before = tokens.of_chat(asked, tokenizer, asks=False)
        opened = tokens.of_chat(asked, tokenizer, asks=True)
    if ids[: len(before)] != before:
        raise TemplateRefusal(
            f"messages: {place}: the template writes what is before this answer otherwise once it"
            " is there, so that its tokens cannot be told"
        )
    closed = tokens.of_chat(
        replace(chat, messages=chat.messages[: place + 1]), tokenizer, asks=False
    )
    limit = len(closed) if ids[: len(closed)] == closed else None
    return max(len(before), tokens.common(opened, ids)), limit
