"""What a running server serves, and how it goes: gathered from its routes, shown in columns."""

from __future__ import annotations

import re
import time
from datetime import timedelta
from typing import Any

from serve.client import adapters, models
from serve.client.adapters import Facts
from serve.client.connection import Connection, ServerError, plain, tame
from serve.errors import Draining

UNAVAILABLE = 503


async def gathered(connection: Connection) -> dict[str, Any]:
    """Base, quantization, aliases, load and state. A server that is not ready to answer tells its
    state and the reason, and no more."""
    told: dict[str, Any] = {"server": connection.address.url, "state": "ready", "reason": None}
    try:
        await connection.get("/readyz")
    except ServerError as fault:
        if fault.answered != UNAVAILABLE:
            raise
        told |= {"state": _state(fault), "reason": str(fault)}
    try:
        base = (await models.cards(connection))[0]
        engine = await connection.get("/admin/engine")
        aliases = await adapters.listed(connection)
        page = await connection.text("/metrics")
    except ServerError as fault:
        if fault.answered == UNAVAILABLE and told["state"] != "ready":
            return told
        raise
    return told | {
        "base": base["id"],
        "layers": engine.get("layers"),
        "vllm": engine.get("vllm"),
        "max_model_len": base.get("max_model_len"),
        "uptime_s": max(0, int(time.time()) - int(base.get("created", 0))),
        "running": gauge(page, "vllm:num_requests_running"),
        "waiting": gauge(page, "vllm:num_requests_waiting"),
        "adapters": aliases,
    }


def gauge(page: str, name: str) -> int | None:
    """The sum over every series of a metric in Prometheus' text format; None without any."""
    found = re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", page, re.MULTILINE)
    return int(sum(map(float, found))) if found else None


def _state(fault: ServerError) -> str:
    return "draining" if fault.reason == Draining.code else "not ready"


def lines(told: dict[str, Any]) -> list[str]:
    """What was gathered, for people."""
    rows = {"server": told["server"], "state": _reasoned(told["state"], told["reason"])}
    if "base" in told:
        rows |= {
            "base": f"{told['base']}, context {told['max_model_len']}",
            "layers": _layers(told["layers"]),
            "vLLM": told["vllm"],
            "up": str(timedelta(seconds=told["uptime_s"])),
            "requests": f"{told['running']} running, {told['waiting']} waiting",
        }
    text = [tame(f"{name:<10}{value}") for name, value in rows.items()]
    return [*text, "", *table(told["adapters"])] if "base" in told else text


def table(aliases: list[Facts]) -> list[str]:
    """Adapters in columns; what is not served as wanted says why below."""
    if not aliases:
        return ["no adapters"]
    heads = ("ALIAS", "VERSION", "STATE", "CANARY", "PINNED", "RANK", "REQUESTS")
    rows = [heads, *map(_row, aliases)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    parts = [part for facts in aliases for part in (facts, facts["canary"]) if part]
    return [
        *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows),
        *(plain(f"{part['wanted']}: {part['reason']}") for part in parts if part["reason"]),
    ]


def served(facts: Facts) -> list[str]:
    """What a change came to."""
    if facts.get("deleted"):
        return [f"{facts['alias']} is served no more"]
    told = f"{facts['alias']} is served by {facts['version']}"
    if canary := facts["canary"]:
        told += f", for {_percent(canary)} of its users by {canary['version']}"
    if facts["previous"]:
        told += f"; a rollback leads to {facts['previous']}"
    return [plain(told)]


def _row(facts: Facts) -> tuple[str, ...]:
    canary = facts["canary"]
    share = f"{canary['version']} {_percent(canary)} {canary['state']}" if canary else "-"
    size = facts["rank"] or (facts["virtual_tokens"] and f"{facts['virtual_tokens']} tokens") or "-"
    cells = (
        facts["alias"], facts["version"], facts["state"], share,
        "yes" if facts["pinned"] else "-", size, facts["requests"],
    )  # fmt: skip
    return tuple(map(plain, cells))


def _percent(canary: Facts) -> str:
    return f"{100 * canary['weight']:.4g} %"


def _reasoned(state: str, reason: str | None) -> str:
    return f"{state}: {reason}" if reason else state


def _layers(ranks: list[dict[str, int]] | None) -> str:
    """The kernels that compute the model's layers; those of ranks that are alike once."""
    texts = [
        ", ".join(f"{count} x {kernel}" for kernel, count in rank.items()) for rank in ranks or ()
    ]
    return " | ".join(dict.fromkeys(texts)) or "unknown"
