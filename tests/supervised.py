"""The real supervisor over the stand-in worker, as a process of its own to be hurt and asked.

`python -m tests.supervised PACE` serves as QUANTSERVE_* say; PACE is a JSON object of the parent's
own times, and `command` of what it starts.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from serve import settings
from serve.console import Console
from serve.supervisor import Pace, Supervisor
from serve.vllm_flags import adopt
from serve.watch import Limits

ROOT = Path(__file__).parents[1]
PR_SET_CHILD_SUBREAPER = 36
HANGS_S = 300  # a machine shared by many
QUICK = {"pauses_s": [0.05], "farewell_s": 5.0}
LIMITS = {"look_every_s": 0.1, "stalled_s": 0.3, "stopped_s": 1.5, "blocked_s": 60.0}


@dataclass(frozen=True)
class Parent:
    """A running one; `files` is what the stand-in reads."""

    process: subprocess.Popen[bytes]
    log: Path
    files: Path

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def until(self, true: Callable[[], object], what: str = "") -> None:
        end = time.monotonic() + HANGS_S
        while not true():
            assert time.monotonic() < end, f"waited in vain {what}:\n{self.said()}"
            time.sleep(0.02)

    def until_said(self, words: str, times: int = 1) -> None:
        self.until(lambda: self.said().count(words) >= times, f"for {words!r}")

    @property
    def url(self) -> str:
        self.until_said("listening on ")
        return self.said().partition("listening on ")[2].split()[0]

    def ask(self, path: str, method: str = "GET", **more: Any) -> httpx.Response:
        """On a connection of its own, as probes do."""
        return httpx.request(method, self.url + path, timeout=HANGS_S, verify=False, **more)

    def worker(self) -> dict[str, Any]:
        """What the worker says of itself, once nobody but it answers."""
        found: list[dict[str, Any]] = []

        def asked() -> bool:
            try:
                reply = self.ask("/")
            except httpx.TransportError:  # it was killed with this connection in its hands
                return False
            found[:] = [reply.json()] if reply.status_code == 200 else []
            return bool(found) and found[0]["status"] != "loading"

        self.until(asked, "for the worker")
        return found[0]

    def signal(self, sign: signal.Signals) -> None:
        self.process.send_signal(sign)


@contextmanager
def supervised(folder: Path, *flags: str, **given: Any) -> Iterator[Parent]:
    """`given`: the parent's times (of Pace, Limits), `command`, and settings."""
    files = folder / "stand-in"
    files.mkdir(exist_ok=True)
    artifact = folder / "artifact"
    artifact.mkdir(exist_ok=True)
    (artifact / "config.json").write_text("{}")
    own = {**QUICK, **{k: given.pop(k) for k in list(given) if k in Pace.__dataclass_fields__}}
    limits = LIMITS | {k: given.pop(k) for k in list(given) if k in Limits.__dataclass_fields__}
    own |= {"limits": limits, "command": given.pop("command", None)}
    given = {"port": 0, "artifact": artifact, "state_dir": folder} | given
    env = {f"QUANTSERVE_{name.upper()}": str(value) for name, value in given.items()}
    env |= {"QUANTSERVE_VLLM_FLAGS": json.dumps(flags), "STAND_IN": str(files)}
    log = folder / "log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.supervised", json.dumps(own)],
            cwd=ROOT, stdout=sink, stderr=sink, env={**os.environ, **env},
        )  # fmt: skip
    try:
        yield Parent(process, log, files)
    finally:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)  # the second is at once
        try:
            process.wait(HANGS_S)
        finally:
            process.kill()


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # as PID 1 of a container is
    own = json.loads(sys.argv[1])
    limits, command = Limits(**own.pop("limits")), own.pop("command")
    pace = Pace(**own | {"pauses_s": tuple(own["pauses_s"])}, limits=limits)
    command = command or [sys.executable, "-m", "tests.stand_in_worker"]
    chosen = adopt(settings.load(), {})
    console = Console()
    parent = Supervisor(chosen, console.say, verbose=False, command=command, pace=pace)
    code = asyncio.run(parent.run())
    console.close()
    sys.exit(code)


if __name__ == "__main__":
    main()
