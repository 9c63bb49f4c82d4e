"""vLLM's Prometheus logger with what it lacks: tokens per alias, and adapters' public names.

A `vllm.stat_logger_plugins` entry. As a subclass of vLLM's own logger it takes its place, so that
our counters and vLLM's move in the same call and their sums are equal whenever they are read. vLLM
counts tokens as its engine hands them out, per step: of every child of `n`, of every prompt of a
batch, of beams and of requests that are aborted later. So do we, at the same line.
"""

from __future__ import annotations

import inspect
from typing import Any

from vllm.v1.metrics.loggers import PrometheusStatLogger

from serve.errors import SettingsError
from serve.heartbeat import engine_steps
from serve.metrics import Metrics
from serve.turn import current

metrics = Metrics()  # one per process: the default registry refuses a second

# Of vLLM's OutputProcessor, by the names of their parameters.
EXPECTED = {
    "add_request": ("request", "prompt", "parent_req", "request_index", "queue"),
    "_update_stats_from_output": (
        "req_state", "engine_core_output", "engine_core_timestamp", "iteration_stats",
    ),
}  # fmt: skip


class AliasStats(PrometheusStatLogger):  # type: ignore[misc]
    """Counts what `follow` noted of a step, and shows adapters under the names clients ask for."""

    def __init__(self, vllm_config: Any, engine_indexes: list[int] | None = None) -> None:
        super().__init__(vllm_config, engine_indexes)
        self._shown = ("", "")

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        engine_steps.seen()
        if scheduler_stats is not None:
            self._show_publicly(scheduler_stats)
        super().record(scheduler_stats, iteration_stats, mm_cache_stats, engine_idx)
        if iteration_stats is not None:
            for alias, (prompt, generated) in tokens_of(iteration_stats).items():
                metrics.count_tokens(alias, prompt, generated)

    def _show_publicly(self, stats: Any) -> None:
        """Aliases for versions, and one series at a time: vLLM's gauge keeps every combination."""
        stats.running_lora_adapters = by_alias(stats.running_lora_adapters)
        stats.waiting_lora_adapters = by_alias(stats.waiting_lora_adapters)
        shown = (",".join(stats.running_lora_adapters), ",".join(stats.waiting_lora_adapters))
        if shown != self._shown and self.gauge_lora_info is not None:
            self.gauge_lora_info.clear()
            self._shown = shown


def by_alias(versions: dict[str, int]) -> dict[str, int]:
    """Requests per alias, of requests per `alias@digest`."""
    aliases: dict[str, int] = {}
    for name, requests in sorted(versions.items()):
        alias = name.partition("@")[0]
        aliases[alias] = aliases.get(alias, 0) + requests
    return aliases


def tokens_of(iteration: Any) -> dict[str, list[int]]:
    """alias -> [prompt tokens, generated tokens] of a step."""
    found: dict[str, list[int]] = vars(iteration).setdefault("quantserve_tokens", {})
    return found


def follow(processor: Any, base_name: str) -> None:
    """Note for every request of vLLM's output processor whose it is, and for every step its tokens.

    SettingsError where vLLM has moved what is wrapped. What is noted lives in vLLM's own state of a
    request, which ends with it: finished or aborted.
    """
    for name, expected in EXPECTED.items():
        found = tuple(inspect.signature(getattr(processor, name)).parameters)
        if found != expected:
            raise SettingsError(f"vLLM's OutputProcessor.{name} takes {found}, not {expected}")
    add, update = processor.add_request, processor._update_stats_from_output

    def add_request(request: Any, *args: Any, **kwargs: Any) -> None:
        add(request, *args, **kwargs)
        turn = current.get()
        state = processor.request_states.get(request.request_id)
        if state is not None:
            state.quantserve_alias = (turn.served if turn else "") or base_name

    def update_stats(state: Any, output: Any, timestamp: Any, iteration: Any) -> None:
        if iteration is None:
            return
        prompt, generated = iteration.num_prompt_tokens, iteration.num_generation_tokens
        update(state, output, timestamp, iteration)
        alias = getattr(state, "quantserve_alias", base_name)
        tokens = tokens_of(iteration).setdefault(alias, [0, 0])
        tokens[0] += iteration.num_prompt_tokens - prompt
        tokens[1] += iteration.num_generation_tokens - generated

    processor.add_request, processor._update_stats_from_output = add_request, update_stats
