"""How a text or a chat becomes token ids: exactly as the server that will run the model does it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from quant.errors import CalibrationError, SourceError

# Some templates print today's date unless told one: the same seed must give the same tokens.
_DATE = "1 Jan 2026"


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as fault:
        reason = " ".join(str(fault).split())[:200]
        raise SourceError(f"{folder} has no tokenizer that can be read: {reason}") from fault
    return tokenizer


def of_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """With BOS and EOS where the tokenizer adds them."""
    # Not verbose: we cut long texts into rows, so a warning about their length would mislead.
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids


def of_chat(
    turns: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, *, asks: bool
) -> list[int]:
    """Through the chat template, which writes BOS itself; `asks` opens the answer's turn.

    Without a template, the turns' contents one under the other. Raises jinja2.TemplateError
    for turns that the template refuses.
    """
    if tokenizer.chat_template is None:
        return of_text("".join(f"{turn.get('content')}\n" for turn in turns), tokenizer)
    chat = tokenizer.apply_chat_template(
        list(turns), tokenize=False, add_generation_prompt=asks, date_string=_DATE
    )
    ids: list[int] = tokenizer(chat, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def check_vocabulary(ids: Iterable[int], size: int) -> None:
    """CalibrationError where a token is beyond a model's `size` embeddings."""
    highest = max(ids, default=0)
    if highest >= size:
        raise CalibrationError(
            f"token {highest} is beyond the model's vocabulary of {size}: the tokenizer is another"
            " model's"
        )
