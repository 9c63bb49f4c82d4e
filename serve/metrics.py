"""Every metric of ours: names, labels and buckets; the only importer of prometheus_client.

They stand beside vLLM's own (`vllm:*`) on one /metrics. Label values come from closed sets: the
base, the loaded aliases and their canaries, `none` for requests that never found a model, `gone`,
outcomes and our error codes. A client cannot add a series.

A request is counted once, when its answer has ended, by its outcome:

- `ok`: the whole answer was sent.
- `client_error`: a status of 400 to 499 but 429: nothing was wrong with the server.
- `refused`: 429 or 503: we turned it away for our own reasons (draining, no adapter slot, vLLM's
  queue is full), and it may be sent again.
- `server_error`: any other status from 500 on, an exception that nobody handled, or a 503 because
  the engine ended while it worked on the request.
- `stream_error`: a stream that began with 200 and then carried an error, or lacks its last event.
- `client_gone`: the client left before the end.

An alias that is removed takes its series with it: what they held is added to `gone`, which also
gets what is counted for it afterwards, so that sums over all aliases stay vLLM's. Leave `gone` out
of rates.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

NO_ALIAS = "none"
GONE = "gone"
OUTCOMES = ("ok", "client_error", "server_error", "stream_error", "client_gone", "refused")
TTFT_BUCKETS_S = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.5, 0.75, 1.0,
                  1.5, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0)  # fmt: skip
SWAP_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


# Why a worker ended; a closed set. `none`: none has.
ENDS = (
    "none", "engine_died", "engine_hung", "worker_died", "worker_hung", "start_failed",
    "start_hung", "out_of_memory", "spawn_failed",
)  # fmt: skip


class Lifetimes:
    """What outlives a worker: the parent keeps it, shows it while none serves, and tells the next.

    A new one says that nothing is ready and nothing has ended yet.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self._registry = registry = registry or CollectorRegistry()
        self.ready = Gauge(
            "quantserve_ready", "1 while a request would be served", registry=registry
        )
        self._build = Gauge(
            "quantserve_build_info", "What runs here", ("version", "vllm"), registry=registry
        )
        self._counted = 0
        self._restarts = Counter(
            "quantserve_engine_restarts_total",
            "Workers that were started in place of one that ended",
            registry=registry,
        )
        self._last = Gauge(
            "quantserve_last_restart_info", "Why the last one ended", ("reason",), registry=registry
        )
        self.note(0, "none")

    def built(self, version: str, vllm: str) -> None:
        self._build.labels(version, vllm).set(1)

    def note(self, restarts: int, reason: str) -> None:
        """So many workers ended by now, the last one for that reason, of ENDS."""
        assert reason in ENDS and restarts >= self._counted
        self._restarts.inc(restarts - self._counted)
        self._counted = restarts
        self._last.clear()
        self._last.labels(reason).set(1)

    def page(self) -> bytes:
        """In Prometheus' text format, with whatever else is on the registry."""
        return generate_latest(self._registry)


class Metrics:
    """The instruments, on one registry; `served` says whether something answers to a name."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.served: Callable[[str], bool] = lambda _: True
        self.lifetimes = Lifetimes(registry)
        self.ready = self.lifetimes.ready
        self.requests = Counter(
            "quantserve_requests_total",
            "Requests by how their answers ended",
            ("alias", "outcome"),
            registry=registry,
        )
        self.errors = Counter(
            "quantserve_errors_total",
            "Errors told to clients",
            ("alias", "code"),
            registry=registry,
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
            ("alias", "version", "outcome"),
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

    def label(self, alias: str) -> str:
        """The value of the label `alias` for what is counted now."""
        return alias if alias == NO_ALIAS or self.served(alias) else GONE

    def open_books(self, base_name: str) -> None:
        """Show every outcome from the start, at 0: a rate needs a value before the first one."""
        for alias in (base_name, NO_ALIAS):
            for outcome in OUTCOMES:
                self.requests.labels(alias, outcome)

    def count_tokens(self, alias: str, prompt: int, generated: int) -> None:
        self.prompt_tokens.labels(self.label(alias)).inc(prompt)
        self.generation_tokens.labels(self.label(alias)).inc(generated)

    def forget(self, alias: str) -> None:
        """Drop the series of an alias that is served no more; their counts stay, under `gone`."""
        for family in (self.requests, self.errors, self.prompt_tokens, self.generation_tokens):
            _add_to_gone(family, alias)
            family.remove_by_labels({"alias": alias})
        self.ttft.remove_by_labels({"alias": alias})
        self.forget_canary(alias)

    def forget_canary(self, alias: str) -> None:
        """Drop the series of a canary that has ended."""
        self.canary_requests.remove_by_labels({"alias": alias})


def _add_to_gone(family: Counter, alias: str) -> None:
    for metric in family.collect():
        for sample in metric.samples:
            if sample.name.endswith("_total") and sample.labels["alias"] == alias:
                family.labels(**{**sample.labels, "alias": GONE}).inc(sample.value)


def outcome_of(status: int, *, refuses: bool = True) -> str:
    """Of an answer that was sent whole; `refuses`: a 429 or 503 turned the request away."""
    if status in (429, 503) and refuses:
        return "refused"
    if status >= 500:
        return "server_error"
    return "client_error" if status >= 400 else "ok"
