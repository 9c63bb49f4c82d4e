"""`quant.conversation`: a chat's tokens are those that vLLM makes of the same request."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mistral_common
import pytest
from mistral_common.exceptions import MistralCommonException
from transformers import PreTrainedTokenizerBase
from vllm.config import ModelConfig
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.renderers import hf
from vllm.renderers.chat_utils import parse_chat_messages
from vllm.renderers.params import merge_kwargs
from vllm.tokenizers.mistral import MistralTokenizer

from quant import conversation, tokens
from quant.conversation import Chat
from quant.errors import TemplateRefusal
from quant.records import Record
from tests import chats, tiny


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    made = tiny.model_folder(tmp_path_factory.mktemp("made") / "model", layers=1)
    return ModelConfig(model=str(made), dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    return tokens.load_tokenizer(Path(config.model))


def ours(body: dict[str, Any], tokenizer: PreTrainedTokenizerBase, *, asks: bool) -> list[int]:
    chat = Record.model_validate_json(json.dumps(body)).document
    assert isinstance(chat, Chat)
    return tokens.of_chat(chat, tokenizer, asks=asks)


def theirs(body: dict[str, Any], config: ModelConfig, tokenizer: Any, *, asks: bool) -> list[int]:
    """As vLLM's OnlineRenderer.preprocess_chat goes through a request."""
    template = tokenizer.chat_template
    asked = ChatCompletionRequest.model_validate({**body, "add_generation_prompt": asks})
    tools = None if asked.tools is None else [tool.model_dump() for tool in asked.tools]
    defaults = merge_kwargs(None, {"tools": tools, "tokenize": False})
    params = asked.build_chat_params(template, "auto").with_defaults(defaults)
    form = hf.resolve_chat_template_content_format(
        template, tools, "auto", tokenizer, model_config=config
    )
    told, _, _ = parse_chat_messages(asked.messages, config, content_format=form)
    written = params.get_apply_chat_template_kwargs()
    chat = hf.safe_apply_chat_template(config, tokenizer, told, **written)
    ids: list[int] = tokenizer(chat, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("asks", [False, True], ids=["told", "asked"])
@pytest.mark.parametrize("template", chats.TEMPLATES)
@pytest.mark.parametrize("name", chats.CONVERSATIONS)
def test_a_chat_has_the_tokens_that_vllm_gives_it(
    name: str, template: str, asks: Any, config: ModelConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = chats.TEMPLATES[template]
    try:
        expected = theirs(chats.request(name), config, tokenizer, asks=asks)
    except VLLMValidationError:
        with pytest.raises(TemplateRefusal):
            ours(chats.request(name), tokenizer, asks=asks)
        return
    assert expected and ours(chats.request(name), tokenizer, asks=asks) == expected


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as Mistral's own: mistral-common writes its chats, and no template."""
    folder = tmp_path_factory.mktemp("mistral")
    shutil.copy(Path(mistral_common.__file__).parent / "data" / "tekken_240911.json", folder)
    (folder / "tekken_240911.json").rename(folder / "tekken.json")
    (folder / "config.json").write_text('{"model_type": "mistral"}')
    return folder


def test_mistral_common_writes_what_it_writes_for_vllm(mistral: Path) -> None:
    served, tokenizer = (
        MistralTokenizer.from_pretrained(str(mistral)),
        tokens.load_tokenizer(mistral),
    )
    taken = 0
    for name in chats.CONVERSATIONS:
        asked = ChatCompletionRequest.model_validate(chats.request(name))
        tools = asked.tools and [tool.model_dump() for tool in asked.tools]
        ends = asked.messages[-1]["role"] == "assistant"
        try:
            expected = served.apply_chat_template(
                asked.messages, tools=tools, continue_final_message=ends
            )
        except (MistralCommonException, AssertionError, ValueError):
            with pytest.raises(TemplateRefusal):
                ours(chats.request(name), tokenizer, asks=not ends)
            continue
        taken += 1
        assert ours(chats.request(name), tokenizer, asks=not ends) == expected, name
    assert taken > 10


def test_the_table_shows_every_conversation_to_some_template(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """A table of refusals would hold nothing."""
    taken = set()
    for template in chats.TEMPLATES.values():
        tokenizer.chat_template = template
        for name in chats.CONVERSATIONS:
            try:
                ours(chats.request(name), tokenizer, asks=False)
            except TemplateRefusal:
                continue
            taken.add((name, template))
    for name in chats.CONVERSATIONS:
        assert sum(each == name for each, _ in taken) >= 5, name


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"messages": [{"content": "hi"}]}, "messages: 0: a role is expected"),
        ({"messages": [chats.said("user", 5)]}, "messages: 0: content: a text or a list of parts"),
        ({"messages": [chats.said("user", [5])]}, "content: 0: a part with a type is expected"),
        ({"messages": [chats.said("user", [{"type": "poem"}])]}, "type 'poem' is none that vLLM"),
        ({"messages": [chats.said("user", [{"type": "text", "text": 5}])]}, "text is no text"),
        ({"messages": [chats.said("assistant", "", tool_calls={})]}, "tool_calls: a list is"),
        ({"messages": [chats.said("assistant", "", tool_calls=[{"function": {}}])]}, "with a name"),
        ({"messages": [chats.said("user", "hi")], "tools": [{"type": "function"}]}, "tools: 0: a"),
        ({"messages": [chats.said("user", "hi")], "tools": "[{"}, "tools: the text is no JSON"),
        ({"messages": [chats.said("user", "hi")], "chat_template_kwargs": {"tokenize": 1}},
         "chat_template_kwargs: tokenize is not the template's"),
    ],
)  # fmt: skip
def test_what_vllm_would_refuse_is_refused_with_its_place(body: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=r"^1 validation error") as caught:
        Record.model_validate(body)
    assert says in str(caught.value)


def test_tools_may_be_json_in_a_string_or_bare_functions(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer.chat_template = chats.QWEN3
    body = chats.request("tools")
    expected = ours(body, tokenizer, asks=False)
    assert ours(body | {"tools": json.dumps(body["tools"])}, tokenizer, asks=False) == expected
    bare = [tool["function"] for tool in body["tools"]]
    assert ours(body | {"tools": bare}, tokenizer, asks=False) == expected
    assert ours(body | {"tools": ""}, tokenizer, asks=False) != expected


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "https://a/b.png"}},
        {"type": "image"}, {"type": "input_image", "image_url": "x"}, {"image_url": "x"},
        {"type": "input_audio", "input_audio": {}}, {"type": "video_url"}, {"audio_url": "x"},
    ],
)  # fmt: skip
def test_what_is_seen_or_heard_is_told_from_text(part: dict[str, Any]) -> None:
    shown = [chats.said("user", [*chats.parts("what is it?"), part])]
    assert conversation.has_media(shown)
    assert conversation.has_media([chats.said("system", "x"), *shown])
    assert not conversation.has_media([chats.said("user", chats.parts("image_url"))])
    assert not conversation.has_media([chats.said("user", None), chats.said("user", "image")])
