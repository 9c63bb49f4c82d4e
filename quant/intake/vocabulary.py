"""Models whose embedding has other rows than config.json says: tokens were added in training.

The rows are the truth when the tokenizer fits them. Otherwise tokenizer and weights do not belong
together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from quant import tokens
from quant.errors import SourceError
from quant.intake.architecture import Outline

Shape = tuple[int, ...]


def corrected(
    shapes: Mapping[str, Shape],
    outline: Outline,
    tokenizer: Path,
    where: Path,
    say: Callable[[str], None],
) -> dict[str, int]:
    """What config.json has to say of the rows of `shapes`, by the model's own names.

    SourceError states the rows, config.json's number and the tokenizer's.
    """
    rows, said = shapes[outline.embedding][0], outline.config.get_text_config().vocab_size
    for name in outline.vocabulary:
        if name in shapes and shapes[name][0] != rows:
            raise SourceError(
                f"{where}: the embedding has {rows} rows, the output head {shapes[name][0]}"
            )
    if rows == outline.shapes[outline.embedding][0]:
        return {}
    highest = max(tokens.load_tokenizer(tokenizer).get_vocab().values(), default=-1) + 1
    if highest > rows:
        raise SourceError(
            f"{where}: the embedding has {rows} rows, config.json says {said}, and the tokenizer"
            f" needs {highest}: put the tokenizer that the model was trained with there"
        )
    say(f"config.json says vocab_size {said}; the embedding has {rows} rows, which are taken")
    return {"vocab_size": rows}
