"""Tokens per alias, from vLLM's own output processor and its own Prometheus logger."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Gauge
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.metrics.stats import IterationStats, PrefillStats, SchedulerStats

from serve import stats
from serve.errors import SettingsError
from serve.turn import Turn, current

PROMPT = [1, 2, 3]


def processor() -> OutputProcessor:
    made = OutputProcessor(None, log_stats=True)
    stats.follow(made, "base")
    return made


def add(to: OutputProcessor, name: str, alias: str | None, n: int = 1) -> list[str]:
    """Ask as the engine's client does; alias None: outside of any request of ours."""
    token = current.set(None if alias is None else Turn(alias=alias))
    params = SamplingParams(n=n, max_tokens=99, detokenize=False)
    asked = EngineCoreRequest(
        request_id=f"{name}-internal", external_req_id=name, prompt_token_ids=PROMPT,
        mm_features=None, sampling_params=params, pooling_params=None, arrival_time=0.0,
        lora_request=None, cache_salt=None, data_parallel_rank=None,
    )  # fmt: skip
    try:
        if n == 1:
            to.add_request(asked, None, None, 0, None)
            return [asked.request_id]
        parent, ids = ParentRequest(asked), []
        for index in range(n):
            child, child_params = parent.get_child_info(index)
            made = EngineCoreRequest(**{
                **{field: getattr(asked, field) for field in asked.__struct_fields__},
                "request_id": child, "sampling_params": child_params,
            })  # fmt: skip
            to.add_request(made, None, parent, index, None)
            ids.append(child)
        return ids
    finally:
        current.reset(token)


def step(
    of: OutputProcessor, tokens: dict[str, int], *, first: bool = False, ends: bool = False
) -> IterationStats:
    """What the engine made in one step: request -> tokens."""
    iteration = IterationStats()
    outputs = []
    for name, count in tokens.items():
        prefill = PrefillStats()
        prefill.set(len(PROMPT), 0, 0)
        outputs.append(
            EngineCoreOutput(
                request_id=name, new_token_ids=[7] * count,
                finish_reason=FinishReason.LENGTH if ends else None,
                prefill_stats=prefill if first else None,
            )
        )  # fmt: skip
    of.process_outputs(outputs, 1.0, iteration)
    return iteration


def test_every_child_of_n_is_its_requests() -> None:
    made = processor()
    legal, base = add(made, "a", "legal", n=3), add(made, "b", "base")
    iteration = step(made, {**dict.fromkeys(legal, 1), base[0]: 2}, first=True)
    assert stats.tokens_of(iteration) == {"legal": [9, 3], "base": [3, 2]}
    assert (iteration.num_prompt_tokens, iteration.num_generation_tokens) == (12, 5)
    iteration = step(made, dict.fromkeys(legal, 4), ends=True)
    assert stats.tokens_of(iteration) == {"legal": [0, 12]}


def test_what_is_aborted_was_counted_until_then_and_nothing_is_left() -> None:
    made = processor()
    (name,) = add(made, "a", "legal")
    assert stats.tokens_of(step(made, {name: 1}, first=True)) == {"legal": [3, 1]}
    made.abort_requests([name], internal=True)
    late = step(made, {name: 5})
    assert stats.tokens_of(late) == {} and late.num_generation_tokens == 0
    assert not made.request_states and not made.external_req_ids


def test_a_request_of_nobody_is_the_bases() -> None:
    made = processor()
    (name,) = add(made, "a", None)
    assert stats.tokens_of(step(made, {name: 1}, first=True)) == {"base": [3, 1]}


def test_an_output_processor_of_another_form_is_refused_at_start() -> None:
    class Other(OutputProcessor):  # type: ignore[misc]
        def add_request(self, request: Any) -> None:
            """Another signature."""

    with pytest.raises(SettingsError, match="add_request takes"):
        stats.follow(Other(None, log_stats=True), "base")


def shown(gauge: Gauge) -> list[dict[str, str]]:
    (family,) = gauge.collect()
    return [sample.labels for sample in family.samples]


def test_adapters_are_shown_under_the_names_that_clients_ask_for_one_series_at_a_time() -> None:
    labels = ["max_lora", "waiting_lora_adapters", "running_lora_adapters"]
    gauge = Gauge("lora_requests_info", "", labels, registry=CollectorRegistry())
    logger: Any = SimpleNamespace(gauge_lora_info=gauge, _shown=("", ""))
    for swap in range(50):
        told = SchedulerStats()
        told.running_lora_adapters = {f"legal@{swap:012x}": 2, "legal@cafe": 1, "art@1": 1}
        told.waiting_lora_adapters = {f"team/{swap % 2}@{swap:012x}": 1}
        stats.AliasStats._show_publicly(logger, told)
        assert told.running_lora_adapters == {"art": 1, "legal": 3}
        running, waiting = (
            ",".join(told.running_lora_adapters),
            ",".join(told.waiting_lora_adapters),
        )
        gauge.labels("4", waiting, running).set_to_current_time()  # as vLLM's logger does
        assert shown(gauge) == [
            {"max_lora": "4", "waiting_lora_adapters": f"team/{swap % 2}",
             "running_lora_adapters": "art,legal"}
        ]  # fmt: skip
