"""Every metric of ours: names, labels and buckets; the only importer of prometheus_client.

They stand beside vLLM's own (`vllm:*`) on one /metrics. Label values come from closed sets: the
base, the loaded aliases, `none` for requests that never found a model, status codes and our error
codes. A client cannot add a series.
"""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

NO_ALIAS = "none"
TTFT_BUCKETS_S = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.5, 0.75, 1.0,
                  1.5, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0)  # fmt: skip
SWAP_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The instruments, on one registry."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.ready = Gauge("quantserve_ready", "1 while requests are admitted", registry=registry)
        self.requests = Counter(
            "quantserve_requests_total", "Requests answered", ("alias", "status"), registry=registry
        )
        self.errors = Counter(
            "quantserve_errors_total", "Requests refused", ("alias", "code"), registry=registry
        )
        self.prompt_tokens = Counter(
            "quantserve_prompt_tokens_total", "Prompt tokens", ("alias",), registry=registry
        )
        self.generation_tokens = Counter(
            "quantserve_generation_tokens_total", "Tokens generated", ("alias",), registry=registry
        )
        self.swaps = Counter(
            "quantserve_adapter_swaps_total", "Loads and swaps", ("result",), registry=registry
        )
        self.in_flight = Gauge(
            "quantserve_requests_in_flight", "Requests being answered", registry=registry
        )
        self.adapters_loaded = Gauge(
            "quantserve_adapters_loaded", "Aliases with a published version", registry=registry
        )
        self.ttft = Histogram(
            "quantserve_time_to_first_token_seconds",
            "From the request's arrival to the first byte of a streamed answer",
            ("alias",),
            buckets=TTFT_BUCKETS_S,
            registry=registry,
        )
        self.swap_seconds = Histogram(
            "quantserve_adapter_swap_seconds",
            "From a valid request to the published version",
            buckets=SWAP_BUCKETS_S,
            registry=registry,
        )
        for result in ("ok", "refused", "failed"):
            self.swaps.labels(result)

    def forget(self, alias: str) -> None:
        """Drop the series of an alias that is served no more."""
        per_alias = (
            self.requests,
            self.errors,
            self.prompt_tokens,
            self.generation_tokens,
            self.ttft,
        )
        for family in per_alias:
            family.remove_by_labels({"alias": alias})
