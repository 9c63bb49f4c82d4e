"""Every query of the dashboard and of the alert rules, asked of a Prometheus scraping the server.

Prometheus runs the shipped configuration; only address, key and pace are the test's own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.server import APP_KEY
from tests.prometheus import Prometheus, scraping
from tests.promql import Query, expand, family, metric_names, panel_queries, rule_queries, variables

pytestmark = pytest.mark.e2e

OF_PROMETHEUS = {"up"}  # added to every scrape by Prometheus itself
QUERIES = [*panel_queries(), *rule_queries()]


@pytest.fixture(scope="module")
def declared(api: httpx.Client) -> set[str]:
    """Metric families on the TYPE lines of /metrics."""
    text = api.get("/metrics").text
    return set(re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE))


@pytest.fixture(scope="module")
def prometheus(
    api: httpx.Client, key: str, loras: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    target = f"{api.base_url.host}:{api.base_url.port}"
    with scraping(target, key, tmp_path_factory.mktemp("prometheus")) as found:
        for folder in loras[:2]:  # a series is born with the first round and moves with the second
            some_traffic(api, folder)
            found.wait_for_scrapes(2)
        yield found
    api.delete("/admin/adapters/watched").raise_for_status()


def some_traffic(api: httpx.Client, adapter: Path) -> None:
    """The base and an adapter answer, streaming and not; one request finds no model."""
    api.put("/admin/adapters/watched", json={"path": str(adapter)}).raise_for_status()
    ask = {"messages": [{"role": "user", "content": "Name three colours."}], "max_tokens": 8}
    for model in ("base", "watched"):
        for stream in (False, True):
            told = ask | {"model": model, "stream": stream}
            api.post("/v1/chat/completions", json=told).raise_for_status()
    lost = api.post("/v1/chat/completions", json=ask | {"model": "nobody"})
    assert lost.status_code == httpx.codes.NOT_FOUND, lost.text


def test_the_shipped_configuration_scrapes_the_server(prometheus: Prometheus) -> None:
    targets = prometheus.get("targets", state="active")["activeTargets"]
    health = {
        target["labels"]["job"]: (target["health"], target["lastError"]) for target in targets
    }
    assert health == {"quantserve": ("up", ""), "prometheus": ("up", "")}


@pytest.mark.parametrize(("given", "status"), [("sk-of-nobody-0123456789", 401), (APP_KEY, 403)])
def test_a_key_without_the_scope_reads_no_metrics(
    api: httpx.Client, given: str, status: int
) -> None:
    reply = api.get("/metrics", headers={"Authorization": f"Bearer {given}"})
    assert reply.status_code == status


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.where)
def test_query_reads_metrics_that_exist(
    query: Query, prometheus: Prometheus, declared: set[str]
) -> None:
    prometheus.query(expand(query.expr))
    stored = set(prometheus.get("label/__name__/values")) | OF_PROMETHEUS
    names = metric_names(query.expr)
    assert names, f"{query.where} reads nothing"
    lost = {name for name in names - stored if family(name) not in declared}
    assert not lost, f"{query.where} reads {sorted(lost)}, which the server does not export"


@pytest.mark.parametrize("query", panel_queries(), ids=lambda query: query.where)
def test_panel_shows_data_under_its_labels(query: Query, prometheus: Prometheus) -> None:
    found = prometheus.query(expand(query.expr))
    assert found, f"{query.where} is empty after traffic"
    labelled = [one for one in found if query.legend_labels() <= set(one["metric"])]
    assert labelled, f"no series has the labels of the legend {query.legend!r}: {found}"
    values = [float(one["value"][1]) for one in labelled]
    assert any(map(math.isfinite, values)), f"{query.where} is only NaN after traffic"


@pytest.mark.parametrize(("name", "selector", "label"), list(variables()))
def test_variable_offers_values(
    name: str, selector: str, label: str, prometheus: Prometheus
) -> None:
    values = prometheus.get(f"label/{label}/values", **{"match[]": selector})
    assert values, f"variable {name} is empty"


def test_rules_are_evaluated_and_silent_on_a_healthy_server(prometheus: Prometheus) -> None:
    groups = prometheus.get("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == {
        q.where.removeprefix("rule ") for q in rule_queries()
    }
    assert not [rule["name"] for rule in rules if rule["health"] != "ok"]
    assert not [rule["name"] for rule in rules if rule["state"] != "inactive"]


def test_unbounded_series_are_not_stored(prometheus: Prometheus) -> None:
    stored = prometheus.get("label/__name__/values")
    assert "vllm:lora_requests_info" not in stored
    assert not [name for name in stored if name.endswith("_created")]
