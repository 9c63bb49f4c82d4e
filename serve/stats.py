"""Tokens per alias, from the engine's own closing statistics of each request.

A `vllm.stat_logger_plugins` entry. vLLM builds it in the API process beside its Prometheus logger,
which stays; the alias of a request is what `serve.turn.ledger` noted when it reached the engine.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from serve.metrics import Metrics
from serve.turn import ledger

metrics = Metrics()  # one per process: the default registry refuses a second


class AliasStats(StatLoggerBase):  # type: ignore[misc]
    """Counts prompt and generation tokens of finished requests."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self._engine_index = engine_index
        self._model = vllm_config.model_config.model

    def record(
        self,
        scheduler_stats: Any,  # noqa: ARG002 - vLLM's interface
        iteration_stats: Any,
        mm_cache_stats: Any = None,  # noqa: ARG002
        engine_idx: int = 0,  # noqa: ARG002
    ) -> None:
        if iteration_stats is None:
            return
        for finished in iteration_stats.finished_requests:
            alias = ledger.settle(finished.request_id)
            if alias is not None:
                metrics.prompt_tokens.labels(alias).inc(finished.num_prompt_tokens)
                metrics.generation_tokens.labels(alias).inc(finished.num_generation_tokens)

    def log_engine_initialized(self) -> None:
        """Nothing to tell: vLLM's own logger does."""
