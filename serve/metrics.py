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
        def counter(name: str, told: str, labels: tuple[str, ...]) -> Counter:
            return Counter(f"quantserve_{name}", told, labels, registry=registry)

        self.ready = Gauge("quantserve_ready", "1 while requests are admitted", registry=registry)
        self.requests = counter("requests", "Requests answered", ("alias", "status"))
        self.errors = counter("errors", "Requests refused or failed", ("alias", "code"))
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens computed", ("alias",))
        self.generation_tokens = counter("generation_tokens", "Tokens generated", ("alias",))
        self.swaps = counter("adapter_swaps", "Adapter loads and swaps", ("result",))
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
        for family in (self.prompt_tokens, self.generation_tokens, self.ttft):
            family.remove_by_labels({"alias": alias})
        for family in (self.requests, self.errors):
            family.remove_by_labels({"alias": alias})
