"""The patches of vLLM that decide what a client may bring along."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.renderers import hf
from vllm.v1.engine.async_llm import logger
from vllm.v1.engine.exceptions import EngineDeadError

from quant.lora.cell import TemplateFault
from serve import vllm_compat, vllm_release
from serve.errors import SettingsError

BASE_TEMPLATE = "the operator's"


def renderer(render: vllm_compat.Render) -> Any:
    """As much of vLLM's as writes chats: what it would have written, and with which template."""

    async def stock(config: Any, tokenizer: Any, conversation: list[Any], **asked: Any) -> str:
        assert config == "config" and tokenizer.special_tokens_map and conversation
        return f"stock with {asked['chat_template']}"

    made = SimpleNamespace(_apply_chat_template_async=stock)
    vllm_compat.render_with(made, BASE_TEMPLATE, render)
    return made


async def shown(render: vllm_compat.Render, template: str | None) -> str:
    tokenizer = SimpleNamespace(special_tokens_map={"bos_token": "<s>"})
    apply = renderer(render)._apply_chat_template_async
    told: str = await apply("config", tokenizer, [{}], chat_template=template)
    return told


async def test_the_version_writes_the_chat_before_the_base_and_after_the_client() -> None:
    async def own(messages: list[Any], tokenizer: Any, asked: Any) -> str | None:
        assert messages == [{}] and tokenizer.special_tokens_map and asked
        return "the version's"

    async def none(*_: Any) -> str | None:
        return None

    assert await shown(own, BASE_TEMPLATE) == "the version's"
    assert await shown(own, "the client's") == "stock with the client's"
    assert await shown(none, BASE_TEMPLATE) == f"stock with {BASE_TEMPLATE}"


async def test_what_a_template_refuses_is_the_clients_error() -> None:
    async def broken(*_: Any) -> str | None:
        raise TemplateFault("roles must alternate", "TemplateError")

    with pytest.raises(VLLMValidationError, match="roles must alternate"):
        await shown(broken, BASE_TEMPLATE)


def test_the_api_forgets_that_the_engine_takes_embeddings() -> None:
    config = SimpleNamespace(enable_prompt_embeds=True)
    assert vllm_compat.close_to_clients(config)
    assert not config.enable_prompt_embeds and not vllm_compat.close_to_clients(config)


def test_the_tokenizer_keeps_its_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "_ensure_prompt_embeds_placeholder_token"
    monkeypatch.setattr(hf, name, vars(hf)[name])  # put back afterwards
    vllm_compat.keep_vocabulary()
    assert vars(hf)[name](SimpleNamespace()) == -1, "a tokenizer would have been given a token"


def test_an_engine_that_was_stopped_is_not_logged_as_dead() -> None:
    """Before that it is, and other faults always."""
    seen: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = seen.append  # type: ignore[method-assign, assignment]
    asked: list[float | None] = []

    def stop(timeout: float | None = None) -> None:
        asked.append(timeout)
        log(EngineDeadError())
        log(ValueError())

    def log(fault: Exception) -> None:
        logger.error("output_handler failed", exc_info=fault)

    client = SimpleNamespace(shutdown=stop)
    vllm_compat.end_quietly(client)
    logger.addHandler(handler)
    try:
        log(EngineDeadError())
        client.shutdown(timeout=3.0)
    finally:
        logger.removeHandler(handler)
        logger.removeFilter(vllm_compat._is_no_end)
    kinds = [type(record.exc_info[1]) for record in seen if record.exc_info]
    assert kinds == [EngineDeadError, ValueError] and asked == [3.0]


def test_flags_read_from_the_source_are_those_of_the_parser() -> None:
    names: Any = vllm_compat  # that moved between the releases
    parser = names.make_arg_parser(names.FlexibleArgumentParser())
    taken = set(parser._option_string_actions) - {"-h", "--help"}
    read = vllm_release.flags()
    assert taken <= read
    assert {flag for flag in read - taken if not flag.startswith("--no-")} <= {"--help"}


@pytest.mark.parametrize(
    ("flags", "told"),
    [(["--no-such-flag"], "--no-such-flag"), (["--max-num-seqs", "many"], "--max-num-seqs"),
     (["--enable-auto-tool-choice"], "--tool-call-parser")],
)  # fmt: skip
def test_what_the_parser_refuses_is_one_line(
    flags: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SettingsError, match=f"vLLM's flags: .*{told}") as refused:
        vllm_compat.parse(flags)
    assert "\n" not in str(refused.value)
    assert "usage" not in capsys.readouterr().err
