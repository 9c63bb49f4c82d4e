"""A request between vLLM's parsing of it and the engine: noted, limited, prepared, placed.

vLLM's handlers call `watching` and `judge` with every request before they look its model up, and
the engine's client calls `placing` instead of its own `generate` and `encode`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any

from vllm.exceptions import GenerationError
from vllm.sampling_params import SamplingParams

from serve import parsers, request_limits, settings, tools, vllm_compat, vllm_tools, voices
from serve.adapters.canary import opening_of
from serve.adapters.pool import AdapterPool, Version
from serve.errors import AdapterSlotsFull, BadRequest, ModelNotFound, ServeError
from serve.grammars import GrammarTrial
from serve.request_limits import RequestLimits
from serve.serving import Serving
from serve.soft_prompts import SoftPrompts
from serve.turn import Turn, current
from serve.unknown_model import unknown_model


def trial_of(client: Any, serving: Serving) -> GrammarTrial:
    config = client.model_config

    def vocabulary() -> str:
        return vllm_compat.vocabulary(client.renderer.get_tokenizer(), config.get_vocab_size())

    chosen = serving.settings
    backend = str(client.vllm_config.structured_outputs_config.backend)
    return GrammarTrial(
        vocabulary, chosen.max_grammar_bytes, chosen.max_grammar_seconds,
        others=backend not in ("auto", "xgrammar"),
    )  # fmt: skip


def watching(limits: RequestLimits, trial: GrammarTrial) -> Callable[[Any], Awaitable[None]]:
    """What vLLM's handlers call with each request, before they look its model up."""

    async def watch(request: Any) -> None:
        if (turn := current.get()) is not None:
            turn.asked = frozenset(getattr(request, "model_fields_set", ()))
        try:
            _watch(vars(request), turn, limits)
            extract = getattr(request, "extract_structured_outputs", None)
            if extract is not None and (wanted := extract()) is not None:
                await trial.check(wanted)
        except BadRequest as fault:
            _blame(fault)  # some of vLLM's handlers would make a 500 of it
            raise

    return watch


def judge(state: Any, args: Any, serving: Serving) -> None:
    """Prepare requests for tools, and say which models there are where one is not."""
    shown = state.online_renderer
    reads, forces = vllm_tools.reads_calls(shown)
    chosen = parsers.choose(settings.load())
    base = tools.of(chosen, reads=reads, forces=forces, runs=args.tool_server is not None)
    model_type = str(shown.model_config.hf_config.model_type)

    def prepare(request: Any) -> None:
        own = voices.voice().template(tools=True)
        base.beside(own, model_type).prepare(request, _warn)

    def unknown(name: Any) -> ModelNotFound:
        return unknown_model(name, [serving.base_name, *serving.pool.live()])

    vllm_tools.hold_arguments(shown, _warn)
    vllm_tools.judge_requests(prepare, unknown, _blame)


def _warn(text: str) -> None:
    turn = current.get()
    if turn is not None and text not in turn.warnings:
        turn.warnings.append(text)


def _blame(fault: ServeError) -> None:
    turn = current.get()
    if turn is not None:
        turn.fault = fault


def _watch(asked: Mapping[str, Any], turn: Turn | None, limits: RequestLimits) -> None:
    """Note whom a request is for; BadRequest where it asks too much, or brings embeddings."""
    if turn is not None:
        user = asked.get("user")
        turn.user = user if isinstance(user, str) else ""
        turn.opening = opening_of(asked)
        turn.names_nothing = not asked.get("model")
    if asked.get("prompt_embeds") is not None:
        raise BadRequest("embeddings cannot be sent to this server", param="prompt_embeds")
    request_limits.check(asked, limits)


def placing(stock: Any, serving: Serving, soft: SoftPrompts | None) -> Any:
    """vLLM's `generate` or `encode`: see to the adapter's place.

    A request of an adapter waits here until the engine may be asked for it, and holds its version
    until the engine has answered, also where the HTTP request ends before (background responses).
    """

    def asked(prompt: Any, params: Any, request_id: str, *args: Any, **kwargs: Any) -> Any:
        turn = current.get()
        if turn is not None:
            turn.alias = turn.alias or serving.base_name
        generates = isinstance(params, SamplingParams)
        if generates:
            voices.add_stops(params)
        if soft is not None and turn is not None and turn.version is not None and turn.version.soft:
            if not generates:
                raise BadRequest(f"{turn.alias!r} is prompt-tuned and generates text only")
            prompt, kwargs["lora_request"] = soft.prepend(turn.version, prompt, params), None
        answers = stock(prompt, params, request_id, *args, **kwargs)
        if serving.trial is not None and generates and params.structured_outputs is not None:
            answers = _tried(serving.trial, params.structured_outputs, turn, answers)
        if turn is None or turn.version is None:
            return answers
        return _placed(serving.pool, turn, turn.version, answers)

    return asked


async def _tried(
    trial: GrammarTrial, wanted: Any, turn: Turn | None, answers: AsyncGenerator[Any, None]
) -> AsyncGenerator[Any, None]:
    """What `watching` has not seen: the grammar that vLLM makes of a request's tools."""
    async with aclosing(answers):
        try:
            await trial.check(wanted)
        except BadRequest as fault:
            if turn is not None:
                turn.fault = fault
            raise GenerationError(str(fault)) from fault
        async for answer in answers:
            yield answer


async def _placed(
    pool: AdapterPool, turn: Turn, version: Version, answers: AsyncGenerator[Any, None]
) -> AsyncGenerator[Any, None]:
    try:
        async with pool.running(version), aclosing(answers):
            async for answer in answers:
                yield answer
    except AdapterSlotsFull as fault:
        turn.fault = fault  # for the client; vLLM gets the one kind that it does not log at length
        raise GenerationError(str(fault)) from fault
