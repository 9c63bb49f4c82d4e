"""`quant.assistant`: the tokens that count are those that the model would have written itself."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mistral_common
import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from quant import assistant, tokens
from quant.conversation import Chat
from quant.errors import TemplateRefusal
from quant.records import Text
from tests import chats, tiny
from tests.chats import call, said

QUESTION, ANSWER = said("user", "what is it?"), said("assistant", "a fox")
# As ChatML, with the answers marked.
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer(folder)
    return tokens.load_tokenizer(folder)


def answers(chat: Chat | Text, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What counts, each run of tokens as text."""
    ids, own = assistant.written(chat, tokenizer)
    runs: list[list[int]] = []
    for place, token in enumerate(ids):
        if own[place] and (place == 0 or not own[place - 1]):
            runs.append([])
        if own[place]:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


CALLS = said("assistant", "", tool_calls=[call('{"city": "Rome"}')])
RESULT = said("tool", "sun", tool_call_id="call00001")
TOLD = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
LLAMA_TOLD = '{"name": "weather", "parameters": {"city": "Rome"}}<|im_end|>'


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        ("chatml", [QUESTION, ANSWER], ["a fox<|im_end|>"]),
        ("chatml", [said("system", "be brief"), QUESTION, ANSWER, QUESTION, said("assistant", "b")],
         ["a fox<|im_end|>", "b<|im_end|>"]),
        ("chatml", [ANSWER, QUESTION], ["<|im_start|>assistant\na fox<|im_end|>"]),
        ("chatml", [QUESTION], []),
        ("llama3", [QUESTION, said("assistant", " a fox ")], ["a fox<|im_end|>"]),
        ("llama3", [QUESTION, CALLS, RESULT, ANSWER], [LLAMA_TOLD, "a fox<|im_end|>"]),
        ("qwen3", [QUESTION, CALLS, RESULT, ANSWER],
         [TOLD, "<think>\n\n</think>\n\na fox<|im_end|>"]),
        # Thoughts of the past are cut out once another question follows.
        ("qwen3", [QUESTION, ANSWER | {"reasoning": "hm"}, QUESTION, ANSWER | {"reasoning": "ah"}],
         ["a fox<|im_end|>", "<think>\nah\n</think>\n\na fox<|im_end|>"]),
        ("gemma3", [QUESTION, ANSWER, QUESTION, ANSWER], ["a fox<|im_end|>", "a fox<|im_end|>"]),
        ("mistral", [QUESTION, ANSWER, QUESTION, ANSWER], [" a fox<|im_end|>", " a fox<|im_end|>"]),
    ],
)  # fmt: skip
def test_answers_count_from_their_first_token_to_the_one_that_ends_them(
    template: str, messages: list[Any], expected: list[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = chats.TEMPLATES[template]
    chat = Chat(messages)
    assert answers(chat, tokenizer) == expected
    assert assistant.written(chat, tokenizer)[0] == tokens.of_chat(chat, tokenizer, asks=False)


def test_a_template_that_marks_answers_is_believed(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = MARKED
    chat = Chat([QUESTION, ANSWER, QUESTION, said("assistant", "the dog")])
    assert answers(chat, tokenizer) == ["a fox<|im_end|>", "the dog<|im_end|>"]
    ids, own = assistant.written(chat, tokenizer)
    assert ids == tokens.of_chat(chat, tokenizer, asks=False)
    tokenizer.chat_template = MARKED.replace("{% generation %}", "").replace(
        "{% endgeneration %}", ""
    )
    assert assistant.written(chat, tokenizer) == (ids, own)


def test_thoughts_switched_off_are_the_templates_not_the_models(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer.chat_template = chats.QWEN3
    chat = Chat([QUESTION, ANSWER, QUESTION, ANSWER], variables={"enable_thinking": False})
    assert answers(chat, tokenizer) == ["a fox<|im_end|>", "a fox<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        # The number of messages stands in front of them all.
        ("{{ messages | length }}" + chats.CHATML, "messages: 1: the template writes what is befo"),
        # An answer without an end of its own, rewritten once it is not the last.
        ("{% for m in messages %}{{ m.role }}: {{ m.content if loop.last else m.content | upper }}"
         "\n{% endfor %}", "messages: 1: the template writes "),
        ("{% if messages | length < 3 %}{{ raise_exception('three') }}{% endif %}" + chats.CHATML,
         "three"),
    ],
)  # fmt: skip
def test_answers_that_cannot_be_told_are_refused(
    template: str, says: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(TemplateRefusal, match=says):
        assistant.written(Chat([QUESTION, ANSWER, QUESTION, ANSWER]), tokenizer)


def test_of_a_text_the_completion_counts(tokenizer: PreTrainedTokenizerBase) -> None:
    text = Text("the capital of france is paris", prompt=len("the capital of france is"))
    assert answers(text, tokenizer) == [" paris"]
    assert answers(Text("the capital"), tokenizer) == []
    # A token across the boundary is the completion's: the prompt alone does not have it.
    (counted,) = answers(Text("the quick brown", prompt=len("the qui")), tokenizer)
    assert counted.endswith("ck brown") and len(counted) < len("the quick brown")


def test_mistral_commons_answers_are_told_too(tmp_path: Path) -> None:
    shutil.copy(Path(mistral_common.__file__).parent / "data" / "tekken_240911.json",
                tmp_path / "tekken.json")  # fmt: skip
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    made = tokens.load_tokenizer(tmp_path)
    chat = Chat([QUESTION, ANSWER, QUESTION, said("assistant", "the dog")])
    assert answers(chat, made) == ["a fox</s>", "the dog"]


def test_without_a_template_nobody_answers(tmp_path: Path) -> None:
    plain = tiny.tokenizer(tmp_path, chat=False)
    assert answers(Chat([QUESTION, ANSWER]), plain) == []


def test_special_tokens_that_join_others_are_no_boundary(tmp_path: Path) -> None:
    """The token that opens an answer takes the blanks behind it, as some tokenizers' do."""
    tiny.tokenizer(tmp_path)
    greedy = tokens.load_tokenizer(tmp_path)
    greedy.add_tokens([AddedToken("<bot>", rstrip=True, special=True)])
    greedy.chat_template = (
        "{% for m in messages %}{{ '<bot>' if m.role == 'assistant' else '<s>' }}{{ m.content }}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    assert answers(Chat([QUESTION, said("assistant", "  a fox")]), greedy) == ["a fox<|im_end|>"]
