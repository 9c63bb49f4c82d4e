"""A real Prometheus on a temporary folder, running the shipped files against a given server."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.promql import RULES, SCRAPING


@dataclass(frozen=True, slots=True)
class Prometheus:
    client: httpx.Client

    def get(self, path: str, **params: str) -> Any:
        reply = self.client.get(f"/api/v1/{path}", params=params).json()
        assert reply["status"] == "success", f"{path} {params}: {reply.get('error')}"
        return reply["data"]

    def query(self, expr: str) -> list[dict[str, Any]]:
        data = self.get("query", query=expr)
        if data["resultType"] == "vector":
            return list(data["result"])
        assert data["resultType"] == "scalar", f"{expr} is a {data['resultType']}"
        return [{"metric": {}, "value": data["result"]}]

    def scrapes(self) -> int:
        found = self.query('count_over_time(up{job="quantserve"}[1h])')
        return int(float(found[0]["value"][1])) if found else 0

    def wait_for_scrapes(self, more: int) -> None:
        goal = self.scrapes() + more
        _until(lambda: self.scrapes() >= goal, f"{more} scrapes", seconds=60)


@contextmanager
def scraping(target: str, key: str, folder: Path) -> Iterator[Prometheus]:
    """Prometheus with the shipped configuration; only address, key and pace are the test's own.

    `target` is host:port. Ends the process on the way out.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = _configuration(target, key, folder, own=f"127.0.0.1:{port}")
    binary = shutil.which("prometheus")
    assert binary, "no prometheus on PATH; run tests/setup-prometheus.sh"
    flags = [
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    log = folder / "prometheus.log"
    with log.open("wb") as sink, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        process = subprocess.Popen([binary, *flags], stdout=sink, stderr=subprocess.STDOUT)
        try:
            _until(lambda: _answers(client, process, log), "Prometheus is ready", seconds=30)
            yield Prometheus(client)
        finally:
            process.terminate()
            process.wait(timeout=300)


def _configuration(target: str, key: str, folder: Path, *, own: str) -> Path:
    shipped = yaml.safe_load(SCRAPING.read_text(encoding="utf-8"))
    secret = folder / "metrics_key"
    secret.write_text(key, encoding="utf-8")
    shipped["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    shipped["rule_files"] = [str(RULES)]
    jobs = {job["job_name"]: job for job in shipped["scrape_configs"]}
    jobs["quantserve"]["static_configs"] = [{"targets": [target]}]
    jobs["quantserve"]["authorization"]["credentials_file"] = str(secret)
    jobs["prometheus"]["static_configs"] = [{"targets": [own]}]
    config = folder / "prometheus.yml"
    config.write_text(yaml.safe_dump(shipped), encoding="utf-8")
    return config


def _answers(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> bool:
    assert process.poll() is None, f"Prometheus ended: {log.read_text(encoding='utf-8')}"
    try:
        return client.get("/-/ready").status_code == httpx.codes.OK
    except httpx.ConnectError:
        return False


def _until(true: Callable[[], bool], what: str, *, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited {seconds:.0f} s in vain for: {what}"
        time.sleep(0.2)
