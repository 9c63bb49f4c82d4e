"""An adapter's voice held against the base it is to speak through: what it needs, ready to use."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from quant.lora import cell, voice
from quant.lora.voice import Voice


def fitted(own: Voice, known: Mapping[str, int] | None, folder: Path) -> Voice:
    """The voice with its EOS by number and its template tried out.

    `known` are the base's tokens; None: it does not tell, and they are not compared. AdapterError
    says what cannot be served in `folder`, and what to do.
    """
    cell.check(own, folder)
    ends = own.eos
    if known is not None:
        voice.check_tokens(own, known, folder)
        ends = voice.stop_ids(own, known)
    return replace(own, eos=ends, lists=cell.wants_lists(own))
