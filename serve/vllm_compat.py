"""Names that moved between vLLM's releases, and our patches of what every platform has.

`register` is the `vllm.general_plugins` entry point: vLLM calls it in each of its processes before
it builds anything. What we expect of the places patched here stands in serve/vllm_internals.py;
serve/vllm_release.py
speaks before the first name of vLLM's is imported below.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
from argparse import Namespace
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NoReturn, get_args, get_origin

from pydantic import TypeAdapter

from serve import vllm_release

RELEASE = vllm_release.release()

if RELEASE == "0.32":
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
else:
    from vllm.entrypoints.common.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.common.startup import cli_env_setup
from vllm.entrypoints.launchers.api_server import entry
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.exceptions import VLLMValidationError
from vllm.lora.model_manager import LoRAModelManager
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.platforms import current_platform
from vllm.renderers import hf
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine import async_llm
from vllm.v1.engine import utils as engine_utils
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor import multiproc_executor

from quant.lora.cell import TemplateFault
from serve import forkserver, kernel_report, lifeline
from serve.errors import SettingsError

# messages, the base's tokenizer, the arguments of its apply_chat_template -> the chat, or None
Render = Callable[[list[Any], Any, Mapping[str, Any]], Awaitable[str | None]]

TELL_TIMEOUT_S = 60.0

run_server_worker = entry.run_server_worker


def register() -> None:
    """Put our kernels, LoRA path and norms into this vLLM process. Idempotent."""
    if multiprocessing.parent_process() is None:
        vllm_release.check()  # engines are started by a process that has
    else:
        lifeline.die_with(os.getppid())
    refuse_parts(LoRAModelManager)
    if current_platform.is_cpu():
        from serve import cpu_ops, kernels, lora_cpu

        cpu_ops.register()
        kernels.register()
        lora_cpu.register()


def refuse_parts(manager: Any) -> None:
    """Let the engine refuse an adapter of which it would use a part, and ignore the rest.

    The layers that it wrapped decide, whatever was said at start of what it should wrap.
    """
    stock = vars(manager)["_create_merged_loras_inplace"]
    if stock.__module__ == __name__:
        return

    def merge(self: Any, lora: Any) -> None:
        stock(self, lora)
        found = (self._get_lora_layer_weights(lora, name) for name in self.modules)
        used = {id(weights) for weights in found if weights is not None}
        lost = [name for name, weights in lora.loras.items() if id(weights) not in used]
        if lost := [name for name in lost if not _is_elsewhere(self, name)]:
            raise ValueError(f"the engine has no adapted layer for {', '.join(sorted(lost)[:3])}")

    manager._create_merged_loras_inplace = merge


def _is_elsewhere(manager: Any, module: str) -> bool:
    """Whether it is part of an adapted layer, or on another rank of a pipeline."""
    if module.removesuffix(".base_layer") in manager.modules:
        return True
    parts = manager.model.named_modules()
    absent = (name for name, part in parts if isinstance(part, PPMissingLayer))
    return any(f"{module}.".startswith(f"{name}.") for name in absent)


class _Parser(FlexibleArgumentParser):  # type: ignore[misc] # vLLM is untyped
    """Says what is wrong without 300 lines of usage."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"vLLM's flags: {' '.join(message.split())}")


def parse(argv: list[str]) -> Namespace:
    """vLLM's own parsing and checks of its own flags; SettingsError for what it does not take."""
    cli_env_setup()
    args: Namespace = make_arg_parser(_Parser()).parse_args(argv)
    try:
        validate_parsed_serve_args(args)
    except (TypeError, ValueError) as fault:
        raise SettingsError(f"vLLM's flags: {' '.join(str(fault).split())}") from fault
    return args


def watch_requests(watch: Callable[[Any], Awaitable[None]]) -> None:
    """Call `watch` with every request as vLLM has parsed it, before its model is looked up."""
    for handler in (BaseServing, PoolingBaseServing):
        _watch(handler, watch)


def _watch(handler: Any, watch: Callable[[Any], Awaitable[None]]) -> None:
    stock = handler.__dict__["_check_model"]

    async def check_model(self: Any, request: Any) -> Any:
        await watch(request)
        return await stock(self, request)

    handler._check_model = check_model


def response_item() -> Callable[[Any], object]:
    """Checks one item of the responses API's `input`; ValueError where it is none."""
    kinds = get_args(ResponsesRequest.model_fields["input"].annotation)
    (items,) = (kind for kind in kinds if get_origin(kind) is list)
    return TypeAdapter(get_args(items)[0]).validate_python


def vocabulary(tokenizer: Any, size: int) -> str:
    """What grammars are compiled against, as JSON. ValueError: not of a tokenizer of this kind."""
    import xgrammar

    told = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=size)
    return str(told.serialize_json())


def takes_templates(renderer: Any) -> bool:
    """Whether the base's chats are written by Jinja templates at all."""
    return isinstance(renderer, hf.HfRenderer)


def render_with(renderer: Any, default: str | None, render: Render) -> None:
    """Let `render` write chats where it will, before the base's template.

    A template that came with a request, where the operator allows that, goes before both.
    """
    stock = vars(renderer)["_apply_chat_template_async"]

    async def apply(config: Any, tokenizer: Any, conversation: list[Any], **asked: Any) -> Any:
        if asked.get("chat_template") == default:
            try:
                chat = await render(conversation, tokenizer, asked)
            except TemplateFault as fault:
                raise VLLMValidationError(f"the adapter's chat template: {fault}") from fault
            if chat is not None:
                return chat
        return await stock(config, tokenizer, conversation, **asked)

    renderer._apply_chat_template_async = apply


def keep_vocabulary() -> None:
    """vLLM gives the tokenizer a token for clients' embeddings, which would be out of range here.

    Call before the app is built.
    """
    hf._ensure_prompt_embeds_placeholder_token = lambda _: -1


def close_to_clients(config: Any) -> bool:
    """Whether the engine takes embeddings; from now on the API says that it does not.

    `config` is this process's copy of what the engine was started with.
    """
    takes = bool(config.enable_prompt_embeds)
    config.enable_prompt_embeds = False
    return takes


async def layers_by_kernel(client: Any) -> list[dict[str, int]]:
    """How many layers each kernel computes, of every rank; empty where the engine cannot tell.

    It cannot where the operator gave vLLM a worker extension of another kind.
    """
    asked = client.collective_rpc(kernel_report.METHOD, timeout=TELL_TIMEOUT_S)
    told = (await asyncio.gather(asked, return_exceptions=True))[0]
    return [] if isinstance(told, BaseException) else list(told)


def end_quietly(client: Any) -> None:
    """What the client's own shutdown ends is no fault to be logged with a traceback.

    vLLM closes the engine's socket before it cancels the task that reads from it, which now and
    then is the faster.
    """
    stop = client.shutdown

    def shutdown(timeout: float | None = None) -> None:
        logging.getLogger(async_llm.__name__).addFilter(_is_no_end)
        stop(timeout=timeout)

    client.shutdown = shutdown


def _is_no_end(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], EngineDeadError))


def start_engines_warm() -> None:
    """Fork engine processes from the fork server instead of spawning them (CPU only).

    vLLM's CPU platform sets its start method to `spawn` for fear of threads that exist before a
    fork; the fork server has none.
    """
    if current_platform.is_cpu():
        for module in (engine_utils, multiproc_executor):
            module.get_mp_context = forkserver.context
