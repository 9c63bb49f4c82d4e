"""Every metric of ours: names, labels and buckets; the only importer of prometheus_client.

They stand beside vLLM's own (`vllm:*`) on one /metrics. Label values come from closed sets: the
base, the loaded aliases and their canaries, `none` for requests that never found a model, status
codes and our error codes. A client cannot add a series.
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
        self.in_flight = Gauge(
            "quantserve_requests_in_flight", "Requests being answered", registry=registry
        )
        self._adapters(registry)
        self.ttft = Histogram(
            "quantserve_time_to_first_token_seconds",
            "From the request's arrival to the first byte of a streamed answer",
            ("alias",),
            buckets=TTFT_BUCKETS_S,
            registry=registry,
        )

    def _adapters(self, registry: CollectorRegistry) -> None:
        self.swaps = Counter(
            "quantserve_adapter_swaps_total", "Loads and swaps", ("result",), registry=registry
        )
        self.swap_seconds = Histogram(
            "quantserve_adapter_swap_seconds",
            "From a valid request to the published version",
            buckets=SWAP_BUCKETS_S,
            registry=registry,
        )
        for result in ("ok", "refused", "failed"):
            self.swaps.labels(result)
        self.adapters_loaded = Gauge(
            "quantserve_adapters_loaded", "Aliases with a published version", registry=registry
        )
        self.slots_pinned = Gauge(
            "quantserve_adapter_slots_pinned", "Slots kept by pinned adapters", registry=registry
        )
        self.slot_waiting = Gauge(
            "quantserve_adapter_slot_waiting", "Requests waiting for a slot", registry=registry
        )
        self.canary_requests = Counter(
            "quantserve_canary_requests_total",
            "Requests to aliases with a canary, by the version that answered",
            ("alias", "version", "status"),
            registry=registry,
        )
        self._registry(registry)

    def _registry(self, registry: CollectorRegistry) -> None:
        self.adapters_desired = Gauge(
            "quantserve_adapters_desired", "Aliases in the registry", registry=registry
        )
        self.adapters_failed = Gauge(
            "quantserve_adapters_failed", "Versions that should be served and are not",
            registry=registry,
        )  # fmt: skip
        self.registry_up = Gauge(
            "quantserve_registry_up", "1 while the adapter registry answers", registry=registry
        )
        self.reconciled = Gauge(
            "quantserve_reconcile_last_success_timestamp_seconds",
            "When the registry was last read and followed",
            registry=registry,
        )

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
        self.forget_canary(alias)

    def forget_canary(self, alias: str) -> None:
        """Drop the series of a canary that has ended."""
        self.canary_requests.remove_by_labels({"alias": alias})
