"""The shipped queries as text: where each stands and which metrics it names. Talks to nobody."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parent.parent / "deploy"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "quantserve.json"
RULES = DEPLOY / "prometheus" / "rules.yml"
SCRAPING = DEPLOY / "prometheus" / "prometheus.yml"

_STRING = re.compile(r'"(?:\\.|[^"\\])*"')
_BRACKETS = re.compile(r"\{[^}]*\}|\[[^\]]*\]")
_LABEL_LIST = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
_WORD = re.compile(r"(?<![\w.:$])([a-zA-Z_:][\w:]*)(?!\s*\()(?![\w:])")
_KEYWORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan"}
_LABEL_VALUES = re.compile(r"label_values\((?P<selector>.+),\s*(?P<label>\w+)\)")
_HISTOGRAM = re.compile(r"_(bucket|sum|count)$")


@dataclass(frozen=True, slots=True)
class Query:
    where: str
    expr: str
    legend: str = ""

    def legend_labels(self) -> set[str]:
        return set(re.findall(r"{{\s*(\w+)\s*}}", self.legend))


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return found


def panels() -> list[dict[str, Any]]:
    """Every panel with data, those inside collapsed rows included."""
    tops = dashboard()["panels"]
    return [p for top in tops for p in [top, *top.get("panels", [])] if p["type"] != "row"]


def panel_queries() -> list[Query]:
    return [
        Query(f"panel {panel['title']!r} {target['refId']}", target["expr"], target["legendFormat"])
        for panel in panels()
        for target in panel["targets"]
    ]


def rule_queries() -> list[Query]:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    return [Query(f"rule {rule.get('alert', rule.get('record'))}", rule["expr"]) for rule in rules]


def variables() -> Iterator[tuple[str, str, str]]:
    """(variable, series selector, label) of every variable that asks for the values of a label."""
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] != "query":
            continue
        found = _LABEL_VALUES.fullmatch(variable["query"]["query"])
        assert found, f"variable {variable['name']} is not a label_values query"
        yield variable["name"], expand(found["selector"]), found["label"]


def expand(expr: str) -> str:
    """The query as Grafana sends it when every variable says All."""
    built_in = {"$__rate_interval": "1m", "$__interval": "15s", "$__range": "30m"}
    for name, value in built_in.items():
        expr = expr.replace(name, value)
    for variable in dashboard()["templating"]["list"]:
        expr = expr.replace(f"${variable['name']}", variable.get("allValue", ""))
    assert "$" not in expr, f"an unknown variable is left in {expr}"
    return expr


def metric_names(expr: str) -> set[str]:
    """Names of the series a PromQL expression selects."""
    bare = _BRACKETS.sub("", _STRING.sub('""', expr))
    words = _WORD.findall(_LABEL_LIST.sub("", bare))
    return {word for word in words if word.lower() not in _KEYWORDS}


def family(name: str) -> str:
    """The name on the TYPE line of a series of a classic histogram; any other name as it is."""
    return _HISTOGRAM.sub("", name)
