"""Multiple-choice files: JSONL lines of a question, its choices and the right one, as tokens.

The question goes through the chat template as a user's turn, or plainly where there is none; a
choice is what the model would answer. Refuses a line that cannot be scored, with its number.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, Field, model_validator
from transformers import PreTrainedTokenizerBase

from quant import jsonl, tokens
from quant.errors import CalibrationError, TemplateRefusal
from quant.proof.fidelity import Question, Quiz


class Record(BaseModel):
    """One line. Keys beyond the three are the file owner's business."""

    question: Annotated[str, Field(min_length=1)]
    choices: Annotated[list[str], Field(min_length=2)]
    answer: int

    @model_validator(mode="after")
    def _answer_is_a_choice(self) -> Self:
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(
                f"answer is {self.answer}; an index of the {len(self.choices)} choices is expected"
            )
        return self


def read(file: Path, tokenizer: PreTrainedTokenizerBase, positions: int) -> Quiz:
    """Every question of the file; none may need more than the model's `positions` tokens."""
    questions = []
    for number, record in jsonl.read(file, Record):
        try:
            question = _encode(record, tokenizer)
        except TemplateRefusal as fault:
            raise CalibrationError(
                f"{file}:{number}: the chat template refuses this question: {fault}"
            ) from fault
        if not question.asked or not all(question.choices):
            raise CalibrationError(f"{file}:{number}: the question or a choice has no tokens")
        longest = len(question.asked) + max(map(len, question.choices))
        if longest > positions:
            raise CalibrationError(
                f"{file}:{number}: question and choice take {longest} tokens;"
                f" the model has {positions} positions"
            )
        questions.append(question)
    if not questions:
        raise CalibrationError(
            f'{file} has no question: lines of {{"question", "choices", "answer"}} are expected'
        )
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Quiz(file.name, digest, tuple(questions))


def _encode(record: Record, tokenizer: PreTrainedTokenizerBase) -> Question:
    turn = {"role": "user", "content": record.question}
    asked = tokens.of_chat([turn], tokenizer, asks=True)
    choices = (
        tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in record.choices
    )
    return Question(tuple(asked), tuple(tuple(ids) for ids in choices), record.answer)
