"""One artifact per scheme and one server, shared by every end-to-end test.

Artifacts are made by the command line from the embedded model, and kept in .cache/e2e under all
that decides their bytes: a second run of the tests finds them there, one on another processor or
held to an older one does not.
"""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from quant import artifact, command
from quant.intake import source
from quant.recipe import build
from tests.e2e.server import KEY, QUANTSERVE, Server, serving
from tests.lora import write_lora

ROOT = Path(__file__).parents[2]
CALIBRATION = ("--samples", "12", "--length", "128")
# Nats, on held-out rows. Calibrated on so few, W4A16 was measured at 0.17; on the default's rows
# plain rounding has 0.69 and W8A8 0.005.
MOST_KL = {"w4a16": 0.4, "w8a16": 0.01, "w8a8": 0.1}


@pytest.fixture(scope="session")
def artifacts() -> Callable[[str], Path]:
    """scheme -> the embedded model in that scheme, made here, and no further from it than MOST_KL.

    What such an artifact says is nobody's business: where the model wavers any rounding decides.
    """
    cache = ROOT / ".cache" / "e2e" / identity()

    def made(scheme: str) -> Path:
        target = cache / scheme
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / f".{scheme}.lock").open("w") as lock:  # of two runs at once, one makes it
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_dir():
                command = [QUANTSERVE, "quantize", "demo", "--scheme", scheme, *CALIBRATION]
                command += ["--out", str(target), "--max-kl", str(MOST_KL[scheme])]
                subprocess.run(command, check=True)
        return target

    return made


def identity() -> str:
    """Of the code, the libraries and the arithmetic that make artifacts."""
    recipe = build({})
    opened = source.open(source.DEMO)
    facts = command.facts(recipe, opened, None, gated=True)
    return hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()[:12]


@pytest.fixture(scope="session")
def w4a16(artifacts: Callable[[str], Path]) -> Path:
    return artifacts("w4a16")


@pytest.fixture(scope="session")
def loras(w4a16: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters of different ranks that change what the model says."""
    shapes = artifact.linear_shapes(w4a16)
    every_other = {name: size for place, (name, size) in enumerate(sorted(shapes.items()))
                   if place % 2}  # fmt: skip
    folder = tmp_path_factory.mktemp("loras")
    return [
        write_lora(folder / f"lora{seed}", every_other, rank=rank, seed=seed, strength=0.04)
        for seed, rank in enumerate((4, 8, 16))
    ]


@pytest.fixture(scope="session")
def server(
    w4a16: Path, loras: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The int4 model, `first` given at start."""
    folder = tmp_path_factory.mktemp("server")
    flags = ["--model-name", "base", "--adapter", f"first={loras[0]}"]
    with serving(w4a16, folder, *flags) as started:
        started.until_ready()
        yield started


@pytest.fixture(scope="session")
def key() -> str:
    return KEY


@pytest.fixture(scope="session")
def api(server: Server) -> Iterator[httpx.Client]:
    with server.http() as client:
        yield client
