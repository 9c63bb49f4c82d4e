"""Stand-ins for what a unit test cannot afford to start.

`MemoryEngine` is the adapter pool's engine without vLLM: it keeps the versions it was told of, can
be held mid-load, and can refuse. The real engine runs the same flows in tests/e2e. A `Replica` is
everything of ours around it, as serve.serving puts it together.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import torch
from prometheus_client import CollectorRegistry
from safetensors.torch import save_file

from serve.adapters.catalog import By, Catalog
from serve.adapters.intake import Intake
from serve.adapters.pool import AdapterPool, Version
from serve.adapters.reconciler import Reconciler
from serve.adapters.registry import Registry
from serve.adapters.slots import Slots
from serve.adapters.sources import Sources
from serve.adapters.store import Base, Store
from serve.errors import ServeError
from serve.metrics import Metrics

MODULE = "model.layers.0.self_attn.q_proj"
SHAPES = {MODULE: (8, 6)}
BASE = Base(SHAPES, max_rank=8, weights=None)
BY = By("tests")
KEYS = "app:inference:sk-app-0123456789\nops:admin:sk-ops-0123456789\n"
APP = {"authorization": "Bearer sk-app-0123456789"}
OPS = {"authorization": "Bearer sk-ops-0123456789"}


def write_model(folder: Path) -> Path:
    """A folder that BASE describes: as much of a model as validating an adapter needs."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({f"{MODULE}.weight": torch.zeros(8, 6)}, folder / "model.safetensors")
    return folder


class EngineRefused(ServeError):
    code = "adapter_load_failed"


class MemoryEngine:
    """Fails a test that loads one name twice: two ids of one name are what ends vLLM's engine."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.history: list[str] = []
        self.pinned: set[str] = set()
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked = asyncio.Event()
        self.refuses = False

    async def load(self, version: Version) -> None:
        self.asked.set()
        await self.gate.wait()
        if self.refuses:
            raise EngineRefused(f"{version.name} does not load")
        assert version.name not in self.loaded
        assert version.stored.folder.is_dir()
        self.loaded.append(version.name)
        self.history.append(version.name)

    async def pin(self, version: Version) -> bool:
        assert version.name in self.loaded
        self.pinned.add(version.name)
        return True

    async def unload(self, version: Version) -> None:
        await self.gate.wait()
        if self.refuses:
            raise EngineRefused(f"{version.name} stays")
        self.loaded.remove(version.name)
        self.pinned.discard(version.name)


@dataclass
class Replica:
    """A server's adapters without a server."""

    engine: MemoryEngine
    pool: AdapterPool
    store: Store
    registry: Registry
    reconciler: Reconciler
    catalog: Catalog
    metrics: Metrics

    def published(self) -> dict[str, str]:
        return {alias: route.stable.name for alias, route in self.pool.live().items()}


def replica(
    folder: Path, url: str, *, name: str = "one", base: Base = BASE, slots: int = 3,
    sources: Sources | None = None, base_names: tuple[str, ...] = (),
) -> Replica:  # fmt: skip
    """One that keeps its files in `folder`."""
    engine, metrics = MemoryEngine(), Metrics(CollectorRegistry())
    pool = AdapterPool(engine, Slots(slots, wait_s=0.2), base_names)
    store = Store(folder / "store", base, sources or Sources())
    registry, intake = Registry(url, name, keep=3), Intake(store)
    reconciler = Reconciler(registry, intake, pool, metrics, folder / "registry-cache.json")
    catalog = Catalog(registry, intake, pool, reconciler)
    return Replica(engine, pool, store, registry, reconciler, catalog, metrics)


async def settled() -> None:
    """Let what was started in the background come to its end."""
    for _ in range(10):
        await asyncio.sleep(0)
